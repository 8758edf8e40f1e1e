"""The machine code of the kernels for A100 and H100: wide loads, memory order, no spills. Needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clo_kernels.sparse_decode_attention import PROGRAM_BYTES, SHARED_PROGRAM_BYTES, _vector_bytes

SCRIPT = Path(__file__).parents[2] / "kernels" / "clo_kernels_bench" / "compiled.py"
ARCHS = [80, 90]
# all compile once, for one worker
pytestmark = pytest.mark.xdist_group("ptx")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, ARCHS)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def wide_loads(ptx):
    return re.findall(r"ld\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx)


def loops(ptx):
    """Code from each label to the last branch back to it."""
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        back = [
            m.end() for m in re.finditer(rf"bra(?:\.uni)?\s+{re.escape(label[1])};", ptx) if m.start() > label.end()
        ]
        if back:
            yield ptx[label.end() : back[-1]]


def narrow_loads_of_pages(ptx):
    """Narrower loads inside the copy loop would be vectors of two words."""
    return re.findall(r"ld\.global[.\w:]*\.v2\.b32", ptx)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["gather_pages", "gather_pages_chunked"])
def test_pages_are_read_and_written_16_bytes_at_a_time(compiled, kernel, arch):
    """Four pages of 8 KiB, or two chunks of 16 KiB, over 256 threads: eight loads of 16 bytes in each, then stores."""
    ptx = compiled[f"{kernel}:{arch}"]["ptx"]
    assert len(wide_loads(ptx)) == 8
    assert not narrow_loads_of_pages(ptx)
    last_load = max(m.start() for m in re.finditer(r"ld\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx))
    assert last_load < min(m.start() for m in re.finditer(r"st\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx))
    assert len(re.findall(r"st\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx)) == 8


def test_bulk_reads_leave_no_load_of_pages_to_threads(compiled):
    ptx = compiled["bulk_gather:90"]["ptx"]
    assert "cp.async.bulk.tensor" in ptx
    assert not wide_loads(ptx)
    assert re.search(r"st\.global[.\w:]*\.v(?:4\.b32|2\.b64)", ptx)


@pytest.mark.parametrize("arch", ARCHS)
def test_doorbell_is_released_to_the_system_after_a_barrier(compiled, arch):
    ptx = compiled[f"ring_doorbell:{arch}"]["ptx"]
    order = re.findall(r"bar\.sync|st\.global|atom[.\w:]*", ptx)
    *before, last = order
    assert re.search(r"\.release\.sys|\.sys\.release", last)
    assert ".exch." in last
    # message, barrier, then nothing but the sequence number
    message = before[: before.index("bar.sync")]
    assert "st.global" in message
    assert before[before.index("bar.sync") :].count("st.global") == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_messages_leave_16_bytes_at_a_time(compiled, arch):
    """Of any number of words, since none is promised to the compiler; but for the three words that may be left over."""
    stores = re.findall(r"st\.global[.\w:]*\.b32", compiled[f"ring_doorbell:{arch}"]["ptx"])
    assert sum(".v4." in store for store in stores) == 2  # 1024 words by 128 threads
    assert len(stores) == 3


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("kernel", "in_registers"),
    [
        ("select_pages", True),
        ("select_pages_32k", True),
        ("select_pages_more", False),
        ("resolve_pages", True),
        ("resolve_pages_aligned", True),
        ("resolve_pages_4k", True),
        ("resolve_pages_8k", False),
        ("resolve_pages_more", False),
    ],
)
def test_scores_and_stamps_are_searched_in_registers(compiled, kernel, in_registers, arch):
    """The loop that compares most, and stores nothing, loads nothing either."""
    bodies = [body for body in loops(compiled[f"{kernel}:{arch}"]["ptx"]) if "st.global" not in body]
    search = max(bodies, key=lambda body: len(re.findall(r"setp\.[lg][te]\.[su]32", body)))
    assert re.search(r"shfl\.sync|redux\.sync", search)
    assert ("ld.global" not in search) == in_registers


@pytest.mark.parametrize("arch", ARCHS)
def test_selection_changes_no_layout(compiled, arch):
    """Shared memory is for the sums of warps only."""
    for kernel in ("select_pages", "select_pages_32k", "select_pages_more"):
        assert compiled[f"{kernel}:{arch}"]["shared_bytes"] <= 1024


@pytest.mark.parametrize("arch", ARCHS)
def test_resolving_changes_no_layout_and_waits_little(compiled, arch):
    """Whether sizes are multiples of 16 or not: shared memory is for sums of warps. Loads come before all waits."""
    for kernel in ("resolve_pages", "resolve_pages_aligned", "resolve_pages_4k"):
        assert compiled[f"{kernel}:{arch}"]["shared_bytes"] <= 1024
        ptx = compiled[f"{kernel}:{arch}"]["ptx"]
        assert len(re.findall(r"bar\.sync", ptx)) <= 15
        before = ptx[: ptx.index("bar.sync")]
        slots, pages = (4096, 4096) if kernel == "resolve_pages_4k" else (2048, 1024)
        threads = 32 * 8
        # a selection, where its pages are, stamps of the slots and what they hold
        assert len(re.findall(r"ld\.global[.\w:]*\.b32", before)) == 2 * slots // threads + 2 * pages // threads


@pytest.mark.parametrize("arch", ARCHS)
def test_warps_that_all_read_few_slots_wait_before_any_writes(compiled, arch):
    """Sums of few slots wait for nobody: what is read is read before it is stamped, and again before it is freed."""
    ptx = compiled[f"resolve_pages_few:{arch}"]["ptx"]
    parts = [re.findall(r"(ld|st)\.global", part) for part in ptx.split("bar.sync")]
    # all loads, then stores of what nothing reads; stamps; stamps again, and freed slots; their pages
    assert [("ld" in part, "st" in part) for part in parts] == [(True, True), (False, True), (True, True), (True, True)]
    for part in parts:
        assert sorted(part) == part


@pytest.mark.parametrize("arch", ARCHS)
def test_ready_flag_is_acquired_from_the_system_in_a_loop(compiled, arch):
    ptx = compiled[f"wait_ready:{arch}"]["ptx"]
    looks = re.findall(r"ld\.global\.(?:acquire\.sys|sys\.acquire)\.[bsu]64", ptx)
    assert len(looks) == 2
    # a read-modify-write of what the CPU writes would not be atomic across the link
    assert not re.search(r"\b(?:atom|red)\.", ptx)
    assert "bra" in ptx


@pytest.mark.parametrize("arch", ARCHS)
def test_pages_that_leave_are_stored_16_bytes_at_a_time(compiled, arch):
    """Keys and values of a page of 16 tokens are 8 KiB: two stores of 16 bytes in each of 128 threads, twice."""
    assert len(re.findall(r"st\.global[.\w:]*\.v(?:4\.b32|2\.b64)", compiled[f"append_kv:{arch}"]["ptx"])) >= 4


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_uses_tensor_cores_and_loads_ahead_16_bytes_at_a_time(compiled, arch):
    ptx = compiled[f"attend_split:{arch}"]["ptx"]
    assert "mma.sync" in ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx)
    assert copies
    assert set(copies) == {"0x10"}


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_computes_while_the_next_block_is_copied(compiled, arch):
    """At the wait in the loop the keys and values of one more block are under way; three programs fit an H100's SM."""
    kernel = compiled[f"attend_split:{arch}"]
    assert re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", kernel["ptx"])[0] == "2"
    assert kernel["shared_bytes"] <= PROGRAM_BYTES
    assert 3 * (PROGRAM_BYTES + 1024) <= 228 * 1024
    if kernel["registers"] is not None:
        assert 3 * 4 * 32 * kernel["registers"] <= 2**16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kernel", "widths"), [("", {"0x10"}), ("_coded", {"0x10", "0x8"})])
def test_vectors_that_are_values_too_are_copied_once_and_ahead(compiled, kernel, widths, arch):
    """A block of 32 tokens of 576 bfloat16: nine copies of 16 bytes by each of 256 threads, three blocks under way."""
    ptx = compiled[f"attend_split_shared{kernel}:{arch}"]["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", ptx)
    assert set(copies) == widths
    if not kernel:
        assert len(copies) == 3 * 32 * 576 * 2 / 16 / 256
    # of keys, and of the rest of them, a block each
    assert re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", ptx)[0] == "2"
    assert "mma.sync" in ptx


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("coded", "least"), [(False, 0.9), (True, 0.7)])
def test_what_vectors_take_is_known_before_it_is_compiled(compiled, coded, least, arch):
    """512 values and 64 more, blocks of 32 tokens: as `Tiles` asks whether it fits."""
    kv = SimpleNamespace(value_width=512, head_dim=576, coded=coded)
    expected = _vector_bytes(torch.empty(0, dtype=torch.bfloat16), kv, 3, 32, 16 if coded else 32)
    assert least * expected <= compiled[f"attend_split_shared{'_coded' * coded}:{arch}"]["shared_bytes"] <= expected


@pytest.mark.parametrize(("arch", "programs"), [(80, 2), (90, 3)])
def test_attention_over_coded_pages_loads_ahead_too(compiled, arch, programs):
    """Codes 16 bytes and steps 8 bytes at a time, three of the next block's four copies under way at the first wait."""
    kernel = compiled[f"attend_split_coded:{arch}"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+)", kernel["ptx"])
    assert set(copies) == {"0x10", "0x8"}
    assert re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", kernel["ptx"])[0] == "3"
    assert kernel["shared_bytes"] <= PROGRAM_BYTES
    # as many programs as `resident_programs` counts on: an A100 has shared memory for two
    if kernel["registers"] is not None:
        assert programs * 4 * 32 * kernel["registers"] <= 2**16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["rotate", "rotate_fp32", "rotate_shared"])
def test_rotation_rounds_products_before_it_adds_them(compiled, kernel, arch):
    """As torch's operations do; ptxas may multiply and add at once what is not marked as rounded."""
    ptx = compiled[f"{kernel}:{arch}"]["ptx"]
    assert not re.findall(r"fma\.rn\.f32|(?:mul|add|sub)\.f32", ptx)
    assert "mul.rn.f32" in ptx


def test_registers_and_shared_memory_are_reported_and_nothing_spills(compiled):
    if all(kernel["registers"] is None for kernel in compiled.values()):
        pytest.skip("needs ptxas")
    assert {name: kernel["spill_bytes"] for name, kernel in compiled.items() if kernel["spill_bytes"]} == {}
    assert all(0 < kernel["registers"] <= 255 for kernel in compiled.values())
    # two programs of any fit a multiprocessor of an A100 (164 KiB) side by side, but for those that hold wide vectors
    wide = {name for name in compiled if name.startswith("attend_split_shared")}
    assert all(kernel["shared_bytes"] <= 81 * 1024 for name, kernel in compiled.items() if name not in wide)
    assert all(compiled[name]["shared_bytes"] <= SHARED_PROGRAM_BYTES for name in wide)
