"""The best pages of the heads that missed, among the candidates of each sequence.

Finds the score of the last page chosen by cutting the range of bit patterns in eight again and again, so a row of any
length takes one program and no sort. Does not know what the scores mean. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_tensor, require
from clo_kernels.dispatch import on_device, runs_kernel
from clo_kernels.layout import INT32

PAGE_BLOCK = 4096
SEARCH_WAYS = 8
"""Parts into which a look at all scores cuts the range of the threshold: 11 looks find it among all bit patterns."""


@triton.jit
def _load_keys(scores, at, num_candidates):
    """Integers in the order of the scores, -inf for what is not a number; and which pages are candidates."""
    candidate = (at >= 1) & (at <= num_candidates)
    score = tl.load(scores + at, mask=candidate, other=float("-inf"))
    score = tl.where(score != score, float("-inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), candidate


@triton.jit
def select_pages_kernel(
    scores,
    num_candidates,
    missed,
    selection,
    num_kv_heads,
    num_pages,
    budget,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(missed + row) != 0:
        scores += row * num_pages
        selection += row * budget
        candidates = tl.minimum(tl.load(num_candidates + row // num_kv_heads), num_pages - 1)
        take = tl.maximum(tl.minimum(candidates, budget), 0)

        # the largest key that enough candidates reach
        low = tl.full([], -2147483648, tl.int64)
        high = tl.full([], 2147483647, tl.int64)
        way = tl.arange(0, WAYS)
        while low < high:
            border = high - (high - low) * (way + 1) // WAYS  # the last is `low`
            reaching = tl.zeros([WAYS], tl.int32)
            for start in range(0, candidates + 1, BLOCK):
                key, candidate = _load_keys(scores, start + tl.arange(0, BLOCK), candidates)
                reaches = candidate[None, :] & (key[None, :] >= border.to(tl.int32)[:, None])
                reaching += tl.sum(reaches.to(tl.int32), 1)
            enough = reaching >= take
            low = tl.max(tl.where(enough, border, low), 0)
            high = tl.min(tl.where(enough, high, border - 1), 0)

        above = tl.full([], 0, tl.int32)
        for start in range(0, candidates + 1, BLOCK):
            key, candidate = _load_keys(scores, start + tl.arange(0, BLOCK), candidates)
            above += tl.sum((candidate & (key > low)).to(tl.int32), 0)
        ties_before = tl.full([], 0, tl.int32)
        chosen_before = tl.full([], 0, tl.int32)
        for start in range(0, candidates + 1, BLOCK):
            page = start + tl.arange(0, BLOCK)
            key, candidate = _load_keys(scores, page, candidates)
            tie = (candidate & (key == low)).to(tl.int32)
            tie_rank = ties_before + tl.cumsum(tie, 0) - 1
            chosen = candidate & ((key > low) | ((tie > 0) & (tie_rank < take - above)))
            place = chosen_before + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(selection + place, page, mask=chosen & (place < take))
            ties_before += tl.sum(tie, 0)
            chosen_before += tl.sum(chosen.to(tl.int32), 0)
        for start in range(0, budget, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(selection + place, tl.full([BLOCK], -1, tl.int32), mask=(place >= take) & (place < budget))


def select_pages(
    scores: torch.Tensor, num_candidates: torch.Tensor, missed: torch.Tensor, selection: torch.Tensor
) -> torch.Tensor:
    """Write the best pages of heads that missed into `selection`, in page order, then NO_PAGE; returns `selection`.

    `scores` is float32 [batch, num_kv_heads, num_pages]; pages 1 to `num_candidates` (int32 [batch]) of a sequence are
    candidates: not the page of the sinks, nor the window, nor pages not yet full. `missed` is bool [batch,
    num_kv_heads]; other heads keep their `selection` (int32 [batch, num_kv_heads, budget]). What is not a number counts
    as -inf; of equal scores the lower page wins.
    """
    check_tensor("scores", scores, (-1, -1, -1), torch.float32)
    batch, heads, num_pages = scores.shape
    check_tensor("num_candidates", num_candidates, (batch,), INT32, scores.device)
    check_tensor("missed", missed, (batch, heads), torch.bool, scores.device)
    check_tensor("selection", selection, (batch, heads, -1), INT32, scores.device)
    budget = selection.shape[2]
    require(budget > 0, f"budget = {budget} pages must be positive")
    require(num_pages > 0, f"scores: {num_pages} pages, expected at least one")
    if not runs_kernel(scores):
        return reference.select_pages(scores, num_candidates, missed, selection)
    if batch * heads:
        with on_device(scores):
            select_pages_kernel[(batch * heads,)](
                scores,
                num_candidates,
                missed.view(torch.uint8),
                selection,
                heads,
                num_pages,
                budget,
                BLOCK=min(PAGE_BLOCK, triton.next_power_of_2(num_pages)),
                WAYS=SEARCH_WAYS,
                num_warps=8,
            )
    return selection
