"""Every wrapper in a CUDA graph that is replayed 1,000 times while its inputs change, compared after every replay.

Without a GPU there are no graphs: the same comparisons then run over a few plain calls.
"""

from dataclasses import replace

import pytest
import torch

from clo_kernels import reference
from clo_kernels.layout import PageTable
from clo_kernels.recorded_calls import recorded
from clo_kernels_bench.correctness import cases, on_cpu, pairs
from clo_kernels_bench.problems import Sizes
from tests.kernels.helpers import DEVICE, TOLERANCE
from tests.kernels.test_ring_doorbell import synchronize

REPLAYS = 1000 if DEVICE == "cuda" else 6
DTYPE = torch.float16
SIZES = Sizes(
    device=torch.device(DEVICE), batch=2, kv_heads=2, head_dim=64, num_pages=40, budget=9, slots=14, dtype=DTYPE
)

SHARED = replace(SIZES, group=20, head_dim=48, value_dim=32)
"""Vectors that are key and value in one."""


def fill(tensor, values):
    tensor.copy_(values.to(tensor.dtype))


def randomly(*tensors):
    for tensor in tensors:
        fill(tensor, torch.randn(tensor.shape))


def coin(shape):
    return torch.rand(shape) < 0.5


def change_hit_test(given):
    """Half of the heads turn round, the others stay: no rounding decides."""
    anchor = given["anchor"]
    group = anchor.shape[1] // SIZES.kv_heads
    turned = coin((SIZES.batch, SIZES.kv_heads)).repeat_interleave(group, 1)[..., None].to(DEVICE)
    fill(given["query"], torch.where(turned, -anchor, anchor))


def change_scores(given):
    randomly(given["query"])
    fill(given["index"], torch.randn(given["index"].shape).sort(3).values)
    fill(given["num_candidates"], torch.randint(0, SIZES.num_pages - 1, (SIZES.batch,)))
    fill(given["missed"], coin(SIZES.rows))


def change_selection(given):
    randomly(given["scores"])
    fill(given["num_candidates"], torch.randint(0, SIZES.num_pages - 1, (SIZES.batch,)))
    fill(given["missed"], coin(SIZES.rows))


def change_resolve(given):
    pages = torch.rand(*SIZES.rows, SIZES.num_pages).argsort(-1)[..., : SIZES.budget]
    fill(given["selection"], torch.where(torch.rand(pages.shape) < 0.2, -1, pages))
    fill(given["missed"], coin(SIZES.rows))


def change_gather(given):
    fetch = given["fetch"]
    randomly(given["host_pages"])
    listed = fetch.fetch_pages.shape[2]
    fill(fetch.fetch_pages, torch.rand(*SIZES.rows, SIZES.num_pages).argsort(-1)[..., :listed])
    fill(fetch.fetch_slots, torch.rand(*SIZES.rows, SIZES.slots).argsort(-1)[..., :listed])
    fill(fetch.num_fetched, torch.randint(0, listed + 1, SIZES.rows))


def change_attention(given):
    kv = given["kv"]
    randomly(given["query"], kv.sinks, kv.window, kv.slots)
    slots = torch.rand(*SIZES.rows, SIZES.slots).argsort(-1)[..., : SIZES.budget]
    fill(given["selected"], torch.where(torch.rand(slots.shape) < 0.2, -1, slots))
    fill(given["lengths"], torch.randint(1, SIZES.num_pages * SIZES.page_size, (SIZES.batch,)))


def change_append(given):
    randomly(given["key"], *([] if given["value"] is None else [given["value"]]))
    fill(given["lengths"], given["lengths"] % (SIZES.num_pages * SIZES.page_size) + 1)


def change_rotation(given):
    randomly(given["query"], given["key"])
    angles = torch.rand(given["cosines"].shape) * torch.pi
    fill(given["cosines"], angles.cos())
    fill(given["sines"], angles.sin())


def change_doorbell(given):
    fill(given["message"], torch.randint(-(2**31), 2**31 - 1, given["message"].shape))


def change_wait(given):
    given["sequence"] += 1
    number = int(given["sequence"])
    given["ready"][0] = number - 1 if number % 3 == 0 else number  # every third is late


CHANGES = {
    "hit_test": change_hit_test,
    "score_pages": change_scores,
    "select_pages": change_selection,
    "resolve_pages": change_resolve,
    "gather_pages": change_gather,
    "sparse_decode_attention": change_attention,
    "append_kv": change_append,
    "rotate": change_rotation,
    "ring_doorbell": change_doorbell,
    "wait_ready": change_wait,
}


def assert_agree(path, found, expected):
    within = {**TOLERANCE[DTYPE], "equal_nan": True}
    torch.testing.assert_close(found, expected, **within, msg=lambda text: f"{path}: {text}")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *[pytest.param(name, SIZES, id=name) for name in CHANGES],
        *[
            pytest.param(name, SHARED, id=f"{name}-shared")
            for name in ("hit_test", "score_pages", "gather_pages", "sparse_decode_attention", "append_kv", "rotate")
        ],
    ],
)
def test_replays_see_what_changed(name, sizes):
    operation, given = cases(sizes)[name]
    if name == "resolve_pages":
        given = {**given, "table": PageTable.empty(*SIZES.rows, SIZES.slots, SIZES.num_pages, DEVICE)}
    replay = recorded([lambda: operation(**given)]).replay if DEVICE == "cuda" else lambda: operation(**given)
    mirror = {key: on_cpu(value) for key, value in given.items()}
    for _ in range(REPLAYS):
        CHANGES[name](given)
        for _, tensor, copy in pairs(given, mirror):
            copy.copy_(tensor)
        replay()
        synchronize()
        getattr(reference, name)(**mirror)
        for path, found, expected in pairs(given, mirror):
            assert_agree(path, found.cpu(), expected)


def test_every_operation_is_replayed():
    assert set(CHANGES) == set(cases(SIZES))
