"""The bench: what it writes without a GPU, that wrong code gets no figure, and that its problems are valid calls."""

import json
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

from clo_kernels.page_index import IndexKind
from clo_kernels.recorded_calls import RecordedCalls
from clo_kernels_bench import (
    attention,
    correctness,
    problems,
    run,
    selection,
    shared_vectors,
    small_operations,
    transfers,
)
from clo_kernels_bench.figures import Figure, Report, Verdict
from clo_kernels_bench.goals import PAIR, goals
from clo_kernels_bench.peaks import Peaks
from tests.kernels.helpers import DEVICE

ROOT = Path(__file__).parents[2]
OPERATIONS = {
    "hit_test",
    "score_pages",
    "select_pages",
    "resolve_pages",
    "gather_pages",
    "sparse_decode_attention",
    "append_kv",
    "rotate",
    "ring_doorbell",
    "wait_ready",
}


def bench(*arguments):
    command = [sys.executable, str(ROOT / "kernels" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "HOME": "/tmp"})


def test_a_run_without_a_gpu_says_so_and_writes_every_operation(tmp_path):
    done = bench("--quick", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    names = {
        "schema",
        "environment",
        "quick",
        "note",
        "correctness",
        "kernels",
        "goals",
        "figures",
        "left_out",
        "failed",
    }
    assert set(found) == names
    assert found["environment"]["device"] == "cpu"
    assert {"date", "torch", "triton", "python"} <= set(found["environment"])
    assert "no CUDA device" in found["note"]
    assert {verdict["operation"] for verdict in found["correctness"]} == OPERATIONS
    assert all(verdict["passed"] for verdict in found["correctness"])
    assert {figure["operation"] for figure in found["figures"]} == OPERATIONS
    for figure in found["figures"]:
        samples = sorted(figure["samples_us"])
        assert len(samples) == 3
        assert samples[0] == figure["min_us"] <= figure["median_us"] == samples[1] <= figure["p90_us"] == samples[2]
        assert figure["limit_us"] is None
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seconds", "0"], "--seconds 0: must be positive"), (["--out", "/no/such/x.json"], "no folder /no/such")],
    ids=["seconds", "folder"],
)
def test_refuses(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_summary_of_samples():
    figure = Figure(
        operation="x", case={}, samples_us=tuple(map(float, range(1, 11))), num_bytes=11e3, limit_us=2.75, limit="y"
    )
    assert (figure.median_us, figure.p90_us) == (5.5, 9.0)
    assert figure.bytes_per_s == pytest.approx(2e9)
    assert figure.share_of_limit == pytest.approx(0.5)


def test_a_wrong_operation_gets_no_figure():
    report = Report({}, True, "")
    report.correctness = [Verdict("hit_test", "float32", False), Verdict("resolve_pages", "float32", True)]
    names = ["hit_test + resolve_pages", "resolve_pages"]
    figures = [Figure(operation=name, case={}, samples_us=(1.0,)) for name in names]
    run._run_section(report, "section", lambda: iter(figures), float("inf"), lambda text: None)
    assert [figure.operation for figure in report.figures] == ["resolve_pages"]
    assert report.left_out == ["hit_test + resolve_pages: no figure, since hit_test is wrong"]


def test_a_section_that_fails_keeps_what_it_has():
    def section():
        yield Figure(operation="x", case={}, samples_us=(1.0,))
        raise RuntimeError("out of memory")

    report = Report({}, True, "")
    run._run_section(report, "section", section, float("inf"), lambda text: None)
    assert len(report.figures) == 1
    assert report.left_out == ["section: RuntimeError: out of memory"]
    assert report.failed == ["section"]


def test_a_device_that_is_lost_leaves_what_was_found(monkeypatch):
    def lost(device):
        yield Verdict("hit_test", "float32", False, "CUDA error: an illegal memory access was encountered")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(run, "verdicts", lost)
    report, saved = Report({}, True, ""), []
    run.run(report, lambda text: None, quick=True, seconds=9, save=lambda: saved.append(report.as_json()))
    assert [verdict["operation"] for verdict in saved[-1]["correctness"]] == ["hit_test"]
    assert saved[-1]["failed"] == ["correctness"]
    assert saved[-1]["figures"] == []


def test_an_interrupt_loses_nothing(monkeypatch):
    def section():
        yield Figure(operation="x", case={}, samples_us=(1.0,))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "verdicts", lambda device: [])
    monkeypatch.setattr(run, "_sections", lambda *_, **__: {"section": section})
    report, saved = Report({}, True, ""), []
    with pytest.raises(KeyboardInterrupt):
        run.run(report, lambda text: None, quick=True, seconds=9, save=lambda: saved.append(report.as_json()))
    assert [figure["operation"] for figure in saved[-1]["figures"]] == ["x"]


@pytest.mark.skipif(DEVICE == "cuda", reason="the bench itself runs there")
def test_the_compiler_gets_the_time_that_is_left(monkeypatch):
    given = []

    def slow(command, *, timeout, **_):
        given.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(run.subprocess, "run", slow)
    report, end = Report({}, True, ""), time.monotonic() + 40
    run._run_section(report, "section", lambda: run._compiled(report, end, lambda text: None), end, lambda text: None)
    assert 30 < given[0] <= 40
    assert report.failed == []
    assert report.left_out[0].startswith("registers and shared memory: not done after ")


def figure(operation, microseconds, limit_us=None, num_bytes=None, **case):
    return Figure(
        operation=operation, case=case, samples_us=(microseconds,), limit_us=limit_us, num_bytes=num_bytes, limit="x"
    )


def gathered(microseconds, page=8, programs=16, launch=64, **case):
    return figure("gather_pages", microseconds, 90.0, page_KiB=page, programs=programs, MiB=launch, **case)


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ([], [None] * 4),
        ([gathered(100.0), gathered(200.0, programs=8), gathered(99.0, page=64)], [True, None, None, None]),
        ([gathered(100.0), gathered(101.0, page=64)], [False, None, None, None]),
        # more programs, pages side by side, smaller pages and short launches are no goal
        ([gathered(95.0, programs=32), gathered(95.0, pages="side by side")], [None] * 4),
        ([gathered(500.0, page=4), gathered(95.0, launch=1)], [None] * 4),
        (
            [
                figure("sparse_decode_attention", 100.0, 80.0, 5e8, batch=1),
                figure("sparse_decode_attention", 90.0, 80.0, 5e8, batch=1, splits=3),
                figure("torch sdpa (flash, gqa)", 120.0, 80.0, 5e8, batch=1),
                figure("torch sdpa (cudnn, gqa)", 100.0, 80.0, 5e8, batch=1),
                figure("sparse_decode_attention", 10.0, 5.0, 5e7, batch=2),
            ],
            [None, True, True, None],
        ),
        (
            [
                figure("sparse_decode_attention", 101.0, 80.0, 5e8, batch=1),
                figure("torch sdpa (flash, gqa)", 120.0, 80.0, 5e8, batch=1),
                figure("torch sdpa (cudnn, gqa)", 100.0, 80.0, 5e8, batch=1),
            ],
            [None, False, False, None],
        ),
        (
            [figure(PAIR, 9.0, 10.0), figure(PAIR, 99.0)],
            [None] * 3 + [True],
        ),
        ([figure(PAIR, us, 10.0) for us in (9.0, 10.1)], [None] * 3 + [False]),
    ],
    ids=[
        "none",
        "gather",
        "gather-missed",
        "gather-other",
        "gather-small",
        "attention",
        "attention-missed",
        "pair",
        "pair-missed",
    ],
)
def test_goals(figures, met):
    found = list(goals(figures))
    assert [goal.met for goal in found] == met
    assert all((goal.found == "-") == (goal.met is None) for goal in found)


def test_an_average_that_is_not_there_is_noticed():
    """Over thousands of tokens attention is smaller than what single elements may be off."""
    wanted = torch.full((8, 128), 0.01)
    correctness._compare("out", wanted.clone(), wanted)
    with pytest.raises(AssertionError, match="out: the difference has a norm of"):
        correctness._compare("out", torch.zeros(8, 128).bfloat16(), wanted.bfloat16())


def test_what_changes_a_result_is_noticed():
    sizes = problems.Sizes(
        device=torch.device(DEVICE), batch=2, kv_heads=2, head_dim=64, num_pages=64, budget=12, slots=20,
        dtype=torch.float32,
    )  # fmt: skip
    select, arguments = correctness.cases(sizes)["select_pages"]

    def wrong(**given):
        select(**given)[0, 0, 3] += 1

    assert correctness.verdict("select_pages", "x", select, arguments).passed
    found = correctness.verdict("select_pages", "x", wrong, {**arguments, "selection": problems.empty_selection(sizes)})
    assert (found.passed, found.detail) == (False, "selection differs")


def test_a_recorded_graph_keeps_what_its_calls_use():
    """A graph has addresses only: who holds its replay must hold the tensors."""

    class Graph:
        def replay(self):
            pass

    tensor = torch.ones(1)
    alive = weakref.ref(tensor)
    replay = RecordedCalls(Graph(), [partial(tensor.add_, 1)]).replay
    del tensor
    assert alive() is not None
    replay()
    del replay
    assert alive() is None


@pytest.mark.skipif(DEVICE == "cuda", reason="the bench itself runs there")
class TestSections:
    """Sections that need a GPU for their times only: here every call runs once, at small sizes."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        def once(calls, **_):
            for call in calls:
                call()
            return (1.0, 2.0, 3.0)

        class Graph:
            def __init__(self, calls):
                self.replay = lambda: once(calls)

        def sizes(**changes):
            chosen = {"kv_heads": 2, "head_dim": 16, "dtype": torch.float32} | changes
            for name, most in {"num_pages": 64, "budget": 12, "slots": 24}.items():
                chosen[name] = min(chosen.get(name, most), most)
            return problems.Sizes(**chosen)

        for operation in (
            attention.sparse_decode_attention,
            transfers.gather_pages,
            selection.hit_test,
            selection.resolve_pages,
            selection.score_pages,
            selection.select_pages,
            small_operations.rotate,
        ):
            # the interpreter would take minutes
            monkeypatch.setitem(operation.__globals__, "runs_kernel", lambda tensor: False)
        for module in (attention, selection, shared_vectors, small_operations):
            monkeypatch.setattr(module, "Sizes", sizes)
        monkeypatch.setattr(selection, "LAYERS", 2)
        monkeypatch.setattr(transfers, "HOST_BYTES", 4 << 20)
        monkeypatch.setattr(transfers, "LAUNCH_BYTES", 1 << 20)
        monkeypatch.setattr(transfers, "SMALLER_BYTES", (1 << 19,))
        for module in (attention, selection, shared_vectors, small_operations, transfers):
            monkeypatch.setattr(module, "graph_samples", once)
        monkeypatch.setattr(transfers, "recorded", Graph)
        monkeypatch.setattr(transfers, "event_samples", lambda call, **_: once([call]))
        monkeypatch.setattr(transfers, "beside", lambda work, transfer, **_: once([work, transfer]))
        monkeypatch.setattr(transfers, "attention_calls", lambda given, copies: [lambda: None])

    def test_gathers(self):
        device, peaks = torch.device("cpu"), Peaks(h2d=5e10, hbm=4e12)
        storage = transfers.pinned_storage(device)
        figures = [f for f in transfers.gather_figures(storage, device, peaks, quick=False) if f.num_bytes == 1 << 20]
        assert len(figures) == len(transfers.PAGE_KIB) * 4 + 2
        assert [f.case.get("pages") for f in figures][-3:] == [None, "side by side", "side by side"]
        assert all(f.limit_us == pytest.approx(2**20 / 5e10 * 1e6) for f in figures)
        assert len(list(transfers.interference_figures(storage, device, quick=False))) == 7

    def test_attention(self, monkeypatch):
        monkeypatch.setattr(attention, "default_splits", lambda *_: 6)
        notes = []
        figures = list(
            attention.attention_figures(torch.device("cpu"), Peaks(h2d=1, hbm=1), quick=False, note=notes.append)
        )
        ours = [f for f in figures if f.operation == "sparse_decode_attention"]
        assert [f.case.get("splits") for f in ours] == [None, 2, 4, 8] * 5
        coded = [f for f in figures if f.operation == "attention over coded pages"]
        assert [f.case["batch"] for f in coded] == [1, 16]
        assert len(figures) + len(notes) == 5 * (4 + 2 * len(attention.BACKENDS)) + 2

    def test_shared_vectors(self):
        figures = list(shared_vectors.shared_vector_figures(torch.device("cpu"), Peaks(h2d=1, hbm=1), quick=False))
        names = [f"{name} over shared vectors" for name in ("attention", "hit_test", "score_pages")]
        assert [f.operation for f in figures] == [names[0]] * 2 + [f"{names[0]}, coded", names[1], *[names[2]] * 2]
        assert figures[0].num_bytes == (12 * 16 + 4 + 64) * 576 * 4

    def test_small_operations(self):
        figures = list(small_operations.small_operation_figures(torch.device("cpu"), quick=False))
        assert [f.operation.split(",")[0] for f in figures] == ["rotate", "rotate", "RMS norm", "RMS norm"] * 2

    def test_a_norm_in_one_launch_is_the_library_s(self):
        hidden, weight = torch.randn(3, 1, 64), torch.rand(64)
        once = torch.nn.functional.rms_norm(hidden, (64,), weight, small_operations.EPSILON)
        torch.testing.assert_close(small_operations.library_norm(hidden, weight), once)

    def test_bytes_of_coded_pages(self):
        sizes = problems.Sizes(device=torch.device("cpu"), coded=True)
        # 819 pages of 16 tokens in 1.125 bytes a value, four sinks and a window of 64 in 2
        assert attention.attended_bytes(sizes) == 8 * 2 * 128 * (819 * 16 * 1.125 + 68 * 2)

    def test_gate_and_resolve(self):
        figures = list(selection.resolve_figures(torch.device("cpu"), quick=False))
        # others than the usual warps only where pages are fetched
        assert len(figures) == 2 * (3 * 3 + 2 * len(selection.WARPS))
        assert [f.limit_us for f in figures if f.operation == "hit_test + resolve_pages"] == [10.0] * 3 + [None] * 3

    @pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
    def test_resolve_fetches_and_evicts_in_the_steady_state(self, share):
        sizes = selection.Sizes(device=torch.device("cpu"), kv_heads=4)
        gate = selection._Gate(sizes, share)
        layer = selection._Residency(sizes, gate.missed)
        steps = list(zip(gate.calls(len(layer.chain)), layer.calls(), strict=True))
        for replay in range(3):
            for look, resolve in steps:
                before = layer.table.page_of_slot.clone()
                look()
                resolve()
                assert (layer.out.num_fetched > 0).tolist() == [
                    [True] * round(4 * share) + [False] * round(4 - 4 * share)
                ]
                if replay:
                    left = ((before >= 0) & (before != layer.table.page_of_slot)).sum(-1)
                    assert torch.equal(left.int(), layer.out.num_fetched)
            assert (layer.fetched() > 0) == (share > 0)

    def test_a_resolve_that_fetches_nothing_is_refused(self):
        sizes = selection.Sizes(device=torch.device("cpu"))
        layer = selection._Residency(sizes, problems.everyone(sizes))
        for _ in range(2):
            layer.calls()[0]()
        with pytest.raises(AssertionError, match="resolve_pages: 0 pages fetched, slots full: False"):
            layer.fetched()

    def test_drifting_heads_miss_in_every_step(self):
        sizes = selection.Sizes(device=torch.device("cpu"), kv_heads=4)
        gate = selection._Gate(sizes, 0.5)
        for _ in range(2):
            for call in gate.calls():
                call()
                assert gate.missed.tolist() == [[True, True, False, False]]

    def test_scores_and_selection(self):
        figures = list(selection.selection_figures(torch.device("cpu"), Peaks(h2d=1, hbm=1e9), quick=False))
        assert {f.operation for f in figures} == {"score_pages", "select_pages"}
        assert {f.case["index"] for f in figures if f.operation == "score_pages"} == set(IndexKind)


def test_selections_that_go_round_share_as_much_everywhere():
    sizes = problems.Sizes(device=torch.device("cpu"), kv_heads=2, num_pages=101, budget=20, slots=40)
    chain = problems.selection_cycle(sizes)
    assert len(chain) % 2 == 0
    for first, second in zip(chain, [*chain[1:], chain[0]], strict=True):
        assert all(len(set(first[0, h].tolist()) & set(second[0, h].tolist())) == 12 for h in range(2))
    assert len(torch.cat(chain)[:, 0].unique()) > sizes.slots


def test_chained_selections_share_what_they_should():
    sizes = problems.Sizes(device=torch.device("cpu"), kv_heads=2, num_pages=101, budget=20)
    first, second, *_ = problems.selections(sizes, 3, changed=0.4)
    for head in range(2):
        pages = set(first[0, head].tolist())
        assert len(pages) == 20
        assert 0 not in pages
        assert len(pages & set(second[0, head].tolist())) == 12
