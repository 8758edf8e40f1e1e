"""Which selected pages are resident, which slots are freed for the others, and what to fetch where.

Keeps the page table. A page that is resident stays in its slot; the least recently used slots are freed, never one that
the selection uses. Or a head that missed replaces its whole set. Does not know how pages were selected or who fetches
them. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_tensor, require
from clo_kernels.dispatch import on_device, runs_kernel
from clo_kernels.layout import INT32, PageTable, Resolved

MAX_BUDGET = 16384
SLOT_BLOCK = 8192
"""Slots whose stamps registers hold while they are searched."""
LOOK_BLOCK = 4096
"""Of more slots, those whose stamps are read at once, anew for every look."""
REPLACE_BLOCK = 2048
"""Slots that are emptied at once."""
BUDGET_BLOCK = 4096
"""Pages of the selection that are looked up at once."""
SEARCH_WAYS = 8
"""Parts into which a look at all stamps cuts the range of the threshold: 11 looks find it among 2**32 values."""


@triton.jit
def _as_old(age, border):
    """How many of these stamps are as old as each border."""
    return tl.sum((age[None, :] <= border.to(tl.int32)[:, None]).to(tl.int32), 1)


@triton.jit
def _free(at, freed, leaving, freed_before, fetch_slots, slot_of_page, BLOCK: tl.constexpr):
    """List the freed slots of a block after those before it, and forget the pages in them."""
    index = freed_before + tl.cumsum(freed.to(tl.int32), 0) - 1
    tl.store(fetch_slots + index, at, mask=freed)
    tl.store(slot_of_page + leaving, tl.full([BLOCK], -1, tl.int32), mask=freed & (leaving >= 0))


@triton.jit
def _selected(selection, rank, budget, num_pages):
    """These pages of the selection, and which of them are pages at all."""
    page = tl.load(selection + rank, mask=rank < budget, other=-1)
    return page, (page >= 0) & (page < num_pages)


@triton.jit
def resolve_pages_kernel(
    selection,
    missed,
    page_of_slot,
    last_use,
    slot_of_page,
    out_slots,
    fetch_pages,
    fetch_slots,
    num_fetched,
    budget,
    num_slots,
    num_pages,
    BUDGET_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    WAYS: tl.constexpr,
    REPLACE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    page_of_slot += row * num_slots
    last_use += row * num_slots
    slot_of_page += row * num_pages
    selection += row * budget
    out_slots += row * budget
    fetch_pages += row * budget
    fetch_slots += row * budget
    first = tl.arange(0, BLOCK)
    ranks = tl.arange(0, BUDGET_BLOCK)

    # what is where is written down and read again: kept in registers over the search for room, it would not fit
    num_absent = tl.full([], 0, tl.int32)
    for start in range(0, budget, BUDGET_BLOCK):
        rank = start + ranks
        page, wanted = _selected(selection, rank, budget, num_pages)
        slot = tl.load(slot_of_page + page, mask=wanted, other=-1)
        tl.store(out_slots + rank, slot, mask=rank < budget)
        absent = wanted if REPLACE else wanted & (slot < 0)
        num_absent += tl.sum(absent.to(tl.int32), 0)
    num_absent *= tl.load(missed + row).to(tl.int32)
    tl.store(num_fetched + row, num_absent)
    for start in range(0, budget, BUDGET_BLOCK):
        rank = start + ranks
        unused = (rank < budget) & (rank >= num_absent)
        tl.store(fetch_pages + rank, tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)
        tl.store(fetch_slots + rank, tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)

    if tl.load(missed + row) != 0:
        # no stamp is the largest number, which stands for "no slot"
        newest = tl.full([], -2147483647, tl.int32)
        oldest = tl.full([], 2147483647, tl.int32)
        for start in range(0, num_slots, BLOCK):
            age = tl.load(last_use + start + first, mask=start + first < num_slots, other=2147483647)
            newest = tl.maximum(newest, tl.max(tl.where(age < 2147483647, age, -2147483647), 0))
            oldest = tl.minimum(oldest, tl.min(age, 0))
        stamps = newest + budget  # less the rank: the first of the selection leaves last
        tl.debug_barrier()  # all stamps are read, and what is where is written down
        if REPLACE:
            for start in range(0, num_slots, BLOCK):
                at = start + first
                leaving = tl.load(page_of_slot + at, mask=at < num_slots, other=-1)
                tl.store(slot_of_page + leaving, tl.full([BLOCK], -1, tl.int32), mask=leaving >= 0)
                tl.store(page_of_slot + at, tl.full([BLOCK], -1, tl.int32), mask=at < num_slots)
        else:
            for start in range(0, budget, BUDGET_BLOCK):
                rank = start + ranks
                slot = tl.load(out_slots + rank, mask=rank < budget, other=-1)
                tl.store(last_use + slot, stamps - rank, mask=slot >= 0)
        tl.debug_barrier()  # what is in use is stamped; or every slot is free

        if (num_absent > 0) & (not REPLACE):
            if HELD:
                held_age = tl.load(last_use + first, mask=first < num_slots, other=2147483647)
            # smallest stamp such that enough slots are as old: all stamps are different
            low = oldest.to(tl.int64)
            high = newest.to(tl.int64)
            way = tl.arange(0, WAYS)
            while low < high:
                border = low + (high - low) * (way + 1) // WAYS  # the last is `high`
                if HELD:
                    count = _as_old(held_age, border)
                else:
                    count = tl.zeros([WAYS], tl.int32)
                    for start in range(0, num_slots, BLOCK):
                        at = start + first
                        age = tl.load(last_use + at, mask=at < num_slots, other=2147483647)
                        count += _as_old(age, border)
                enough = count >= num_absent
                low = tl.max(tl.where(enough, low, border + 1), 0)
                high = tl.min(tl.where(enough, border, high), 0)

            if HELD:
                freed = held_age <= low
                leaving = tl.load(page_of_slot + first, mask=freed, other=-1)
                _free(first, freed, leaving, 0, fetch_slots, slot_of_page, BLOCK)
            else:
                freed_before = tl.full([], 0, tl.int32)
                for start in range(0, num_slots, BLOCK):
                    at = start + first
                    freed = tl.load(last_use + at, mask=at < num_slots, other=2147483647) <= low
                    leaving = tl.load(page_of_slot + at, mask=freed, other=-1)
                    _free(at, freed, leaving, freed_before, fetch_slots, slot_of_page, BLOCK)
                    freed_before += tl.sum(freed.to(tl.int32), 0)
            tl.debug_barrier()  # the freed slots are listed

        absent_before = tl.full([], 0, tl.int32)
        for start in range(0, budget, BUDGET_BLOCK):
            rank = start + ranks
            page, absent = _selected(selection, rank, budget, num_pages)
            if not REPLACE:
                absent &= tl.load(out_slots + rank, mask=rank < budget, other=-1) < 0
            place = absent_before + tl.cumsum(absent.to(tl.int32), 0) - 1
            if REPLACE:
                slot = place
                tl.store(fetch_slots + place, slot, mask=absent)
            else:
                slot = tl.load(fetch_slots + place, mask=absent, other=-1)
            tl.store(fetch_pages + place, page, mask=absent)
            tl.store(out_slots + rank, slot, mask=absent)
            tl.store(page_of_slot + slot, page, mask=absent)
            tl.store(slot_of_page + page, slot, mask=absent)
            tl.store(last_use + slot, stamps - rank, mask=absent)
            absent_before += tl.sum(absent.to(tl.int32), 0)


def resolve_pages(
    selection: torch.Tensor,
    missed: torch.Tensor,
    table: PageTable,
    *,
    replace: bool = False,
    out: Resolved | None = None,
) -> Resolved:
    """Look `selection` up in `table`; for heads that missed, make room for what is not resident.

    `selection` is int32 [batch, num_kv_heads, budget], NO_PAGE anywhere, no page twice; pages outside the table count
    as NO_PAGE. `missed` is bool [batch, num_kv_heads]: other heads fetch nothing and their stamps stay. Of two pages
    used in the same step, the one later in the selection leaves first. The n-th page to fetch gets the n-th freed slot,
    in the order of slots. With `replace`, all pages of a head that missed leave, and all of its selection is fetched:
    the n-th page into slot n. Every element of the result is written.
    """
    check_tensor("selection", selection, (-1, -1, -1), INT32)
    batch, heads, budget = selection.shape
    check_tensor("missed", missed, (batch, heads), torch.bool, selection.device)
    table.check(batch, heads, selection.device)
    num_slots = table.page_of_slot.shape[2]
    require(0 < budget <= num_slots, f"budget = {budget} pages, expected 1 to the number of slots, {num_slots}")
    require(budget <= MAX_BUDGET, f"budget = {budget} pages, expected at most {MAX_BUDGET}")
    if out is None:
        out = Resolved.like(selection)
    out.check((batch, heads), selection.device)
    require(out.slots.shape == selection.shape, f"out: budget {out.slots.shape[2]}, expected {budget}")
    if not runs_kernel(selection):
        return reference.resolve_pages(selection, missed, table, replace=replace, out=out)
    if batch * heads:
        with on_device(selection):
            resolve_pages_kernel[(batch * heads,)](
                selection,
                missed.view(torch.uint8),
                table.page_of_slot,
                table.last_use,
                table.slot_of_page,
                out.slots,
                out.fetch_pages,
                out.fetch_slots,
                out.num_fetched,
                budget,
                num_slots,
                table.slot_of_page.shape[2],
                **options(budget, num_slots, replace=replace),
            )
    return out


def options(budget: int, num_slots: int, *, replace: bool) -> dict[str, Any]:
    """Sizes that the kernel is compiled for, and its warps: no thread needs more registers than it has."""
    held = num_slots <= SLOT_BLOCK and not replace
    at_once = REPLACE_BLOCK if replace else SLOT_BLOCK if held else LOOK_BLOCK
    block = min(triton.next_power_of_2(num_slots), at_once)
    budget_block = min(triton.next_power_of_2(budget), BUDGET_BLOCK)
    return {
        "BUDGET_BLOCK": budget_block,
        "BLOCK": block,
        "HELD": held,
        "WAYS": SEARCH_WAYS,
        "REPLACE": replace,
        "num_warps": 8 if max(block, budget_block) <= 2048 else 16,
    }
