"""The best pages of the heads that missed, among the candidates of each sequence.

Finds the score of the last page chosen by cutting the range of bit patterns in three again and again, until exactly
enough pages reach a border, so a row of any length takes one program and no sort. Does not know what the scores mean.
Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_tensor, require
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.flag_pairs import first_of, paired, second_of
from clo_kernels.layout import INT32

PAGE_BLOCK = 32768
"""Scores that 32 warps keep in registers; more are read anew for every look."""
PLACE_BLOCK = 4096
MAX_WARPS = 32


@triton.jit
def _load_keys(scores, at, num_candidates):
    """Integers in the order of the scores; what is not a number counts as -inf, what is no candidate as less."""
    candidate = (at >= 1) & (at <= num_candidates)
    # neighbours go to neighbouring threads, as in stores: wider loads would not bear the mask, nor stores the layout
    score = tl.load(tl.max_contiguous(scores + at, 1), mask=candidate, other=float("-inf"))
    score = tl.where(score != score, float("-inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(candidate, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483648)


@triton.jit
def _reaching(key, first, second):
    """How many keys reach each of two borders."""
    both = tl.sum(paired(key >= first.to(tl.int32), key >= second.to(tl.int32)), 0)
    return first_of(both), second_of(both)


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
    HELD: tl.constexpr,
    PLACE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(missed + row) != 0:
        scores += row * num_pages
        selection += row * budget
        candidates = tl.minimum(tl.load(num_candidates + row // num_kv_heads), num_pages - 1)
        take = tl.maximum(tl.minimum(candidates, budget), 0)

        # the largest key that enough candidates reach is from `low` to `high`, and `above` have a key beyond `high`
        low = tl.full([], -2147483647, tl.int64)
        high = tl.full([], 2147483647, tl.int64)
        above = tl.full([], 0, tl.int32)
        if HELD:
            held = _load_keys(scores, tl.arange(0, BLOCK), candidates)
        while low < high:
            first = low + (high - low + 2) // 3
            second = low + (2 * (high - low) + 2) // 3
            if HELD:
                reach_first, reach_second = _reaching(held, first, second)
            else:
                reach_first = tl.full([], 0, tl.int32)
                reach_second = tl.full([], 0, tl.int32)
                for start in range(0, candidates + 1, BLOCK):
                    key = _load_keys(scores, start + tl.arange(0, BLOCK), candidates)
                    more_first, more_second = _reaching(key, first, second)
                    reach_first += more_first
                    reach_second += more_second
            above = tl.where(reach_first < take, reach_first, tl.where(reach_second < take, reach_second, above))
            high = tl.where(reach_first < take, first - 1, tl.where(reach_second < take, second - 1, high))
            low = tl.where(reach_second >= take, second, tl.where(reach_first >= take, first, low))
            # exactly enough: all that reach it are chosen, and no tie
            exact = (reach_first == take) | (reach_second == take)
            above = tl.where(exact, take, above)
            low = tl.where(exact, tl.where(reach_second == take, second, first) - 1, low)
            high = tl.where(exact, low, high)

        room = take - above  # for pages whose key is `low`
        above_before = tl.full([], 0, tl.int32)
        ties_before = tl.full([], 0, tl.int32)
        for start in range(0, candidates + 1, PLACE):
            page = start + tl.arange(0, PLACE)
            key = _load_keys(scores, page, candidates)
            is_above = key > low
            is_tie = key == low
            both = tl.cumsum(paired(is_above, is_tie), 0)
            above_here = above_before + first_of(both)
            ties_here = ties_before + second_of(both)
            chosen = is_above | (is_tie & (ties_here <= room))
            place = above_here + tl.minimum(ties_here, room) - 1
            tl.store(selection + place, page, mask=chosen & (place < take))
            above_before += tl.sum(is_above.to(tl.int32), 0)
            ties_before += tl.sum(is_tie.to(tl.int32), 0)
        for start in range(0, budget, PLACE):
            place = start + tl.arange(0, PLACE)
            tl.store(selection + place, tl.full([PLACE], -1, tl.int32), mask=(place >= take) & (place < budget))


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
    block = min(PAGE_BLOCK, triton.next_power_of_2(num_pages))
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
                BLOCK=block,
                HELD=num_pages <= block,
                PLACE=min(PLACE_BLOCK, block),
                num_warps=max(4, min(MAX_WARPS, block // 256)),
                **FUSED,
            )
    return selection
