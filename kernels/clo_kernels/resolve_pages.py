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
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.flag_pairs import first_of, paired, second_of
from clo_kernels.layout import INT32, PageTable, Resolved

MAX_BUDGET = 16384
SLOT_BLOCK = 4096
"""Slots that registers hold, and with them as many pages of a selection."""
LOOK_BLOCK = 4096
"""Of more slots, those whose stamps are read at once, anew for every look."""
REPLACE_BLOCK = 2048
"""Slots that are emptied at once."""
BUDGET_BLOCK = 4096
"""Pages of the selection that are looked up at once."""


@triton.jit
def _as_old(age, first, second):
    """How many of these stamps are as old as each of two borders."""
    both = tl.sum(paired(age <= first, age <= second), 0)
    return first_of(both), second_of(both)


@triton.jit
def _borders(low, high):
    """They cut `low` to `high` in three."""
    width = high.to(tl.int64) - low.to(tl.int64)
    first = low.to(tl.int64) + width.to(tl.uint32) // 3
    second = high.to(tl.int64) - (width + 2).to(tl.uint32) // 3
    return first.to(tl.int32), second.to(tl.int32)


@triton.jit
def _narrowed(low, high, first, second, as_old_first, as_old_second, wanted):
    """From where to where the border is sought that `wanted` stamps are as old as: all stamps are different."""
    below = tl.where(as_old_first >= wanted, low, tl.where(as_old_second >= wanted, first + 1, second + 1))
    upto = tl.where(as_old_first >= wanted, first, tl.where(as_old_second >= wanted, second, high))
    # exactly as many: this border will do, whether a slot has that stamp or not
    return tl.where((as_old_first == wanted) | (as_old_second == wanted), upto, below), upto


@triton.jit
def _free(at, freed, leaving, freed_before, fetch_slots, slot_of_page, BLOCK: tl.constexpr):
    """List the freed slots of a block after those before it, and forget the pages in them."""
    index = freed_before + tl.cumsum(freed.to(tl.int32), 0) - 1
    tl.store(fetch_slots + index, at, mask=freed)
    tl.store(slot_of_page + leaving, tl.full([BLOCK], -1, tl.int32), mask=freed & (leaving >= 0))


@triton.jit
def _selected(selection, rank, budget, num_pages):
    """These pages of the selection, and which of them are pages at all."""
    # neighbours go to neighbouring threads, as in scans and scattered accesses: wider loads would all be moved for them
    page = tl.load(tl.max_contiguous(selection + rank, 1), mask=rank < budget, other=-1)
    return page, (page >= 0) & (page < num_pages)


@triton.jit
def _of_slots(values, at, num_slots, other):
    """What a table says of these slots."""
    return tl.load(tl.max_contiguous(values + at, 1), mask=at < num_slots, other=other)


@triton.jit
def _ends(age):
    """Largest and smallest stamp, by one reduction; the largest number stands for "no slot"."""
    both = tl.max(tl.join(tl.where(age == 2147483647, -2147483648, age), ~age), 0)
    newest, inverted = tl.split(both)
    return newest, ~inverted


@triton.jit
def resolve_held_kernel(
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
):
    """All of the selection and all slots are in registers: little is waited for, which is what takes the time here."""
    row = tl.program_id(0).to(tl.int64)
    page_of_slot += row * num_slots
    last_use += row * num_slots
    slot_of_page += row * num_pages
    selection += row * budget
    out_slots += row * budget
    fetch_pages += row * budget
    fetch_slots += row * budget
    rank = tl.arange(0, BUDGET_BLOCK)
    at = tl.arange(0, BLOCK)

    # these are under way together
    selects = tl.load(missed + row).to(tl.int32)
    page, wanted = _selected(selection, rank, budget, num_pages)
    age = _of_slots(last_use, at, num_slots, 2147483647)
    held = _of_slots(page_of_slot, at, num_slots, -1)
    slot = tl.load(slot_of_page + page, mask=wanted, other=-1)
    newest, oldest = _ends(age)

    absent = wanted & (slot < 0)
    num_absent = tl.sum(absent.to(tl.int32), 0) * selects
    tl.store(num_fetched + row, num_absent)
    unused = (rank < budget) & (rank >= num_absent)
    tl.store(tl.max_contiguous(fetch_pages + rank, 1), tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)
    tl.store(tl.max_contiguous(fetch_slots + rank, 1), tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)
    if selects != 0:
        tl.debug_barrier()  # all stamps are read: of few slots each warp reads all, and waits for no other
        stamp = newest + budget - rank  # the first of the selection leaves last
        tl.store(last_use + slot, stamp, mask=wanted & (slot >= 0))
        if num_absent > 0:
            tl.debug_barrier()  # what is in use is stamped
            age = _of_slots(last_use, at, num_slots, 2147483647)
            low = oldest
            high = newest
            while low < high:
                first, second = _borders(low, high)
                as_old_first, as_old_second = _as_old(age, first, second)
                low, high = _narrowed(low, high, first, second, as_old_first, as_old_second, num_absent)
            _free(at, age <= low, held, 0, fetch_slots, slot_of_page, BLOCK)
            place = tl.cumsum(absent.to(tl.int32), 0) - 1
            tl.debug_barrier()  # the freed slots are listed
            taken = tl.load(fetch_slots + place, mask=absent, other=-1)
            tl.store(fetch_pages + place, page, mask=absent)
            tl.store(page_of_slot + taken, page, mask=absent)
            tl.store(slot_of_page + page, taken, mask=absent)
            tl.store(last_use + taken, stamp, mask=absent)
            slot = tl.where(absent, taken, slot)
    tl.store(tl.max_contiguous(out_slots + rank, 1), slot, mask=rank < budget)


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
    REPLACE: tl.constexpr,
):
    """Any number of slots and pages, block by block."""
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
        tl.store(tl.max_contiguous(out_slots + rank, 1), slot, mask=rank < budget)
        absent = wanted if REPLACE else wanted & (slot < 0)
        num_absent += tl.sum(absent.to(tl.int32), 0)
    num_absent *= tl.load(missed + row).to(tl.int32)
    tl.store(num_fetched + row, num_absent)
    for start in range(0, budget, BUDGET_BLOCK):
        rank = start + ranks
        unused = (rank < budget) & (rank >= num_absent)
        tl.store(tl.max_contiguous(fetch_pages + rank, 1), tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)
        tl.store(tl.max_contiguous(fetch_slots + rank, 1), tl.full([BUDGET_BLOCK], -1, tl.int32), mask=unused)

    if tl.load(missed + row) != 0:
        # no stamp is the largest number, which stands for "no slot"
        newest = tl.full([], -2147483647, tl.int32)
        oldest = tl.full([], 2147483647, tl.int32)
        for start in range(0, num_slots, BLOCK):
            age = _of_slots(last_use, start + first, num_slots, 2147483647)
            newest = tl.maximum(newest, tl.max(tl.where(age < 2147483647, age, -2147483647), 0))
            oldest = tl.minimum(oldest, tl.min(age, 0))
        stamps = newest + budget  # less the rank: the first of the selection leaves last
        tl.debug_barrier()  # all stamps are read, and what is where is written down
        if REPLACE:
            for start in range(0, num_slots, BLOCK):
                at = start + first
                leaving = _of_slots(page_of_slot, at, num_slots, -1)
                tl.debug_barrier()  # of a block smaller than the program all warps read all
                tl.store(slot_of_page + leaving, tl.full([BLOCK], -1, tl.int32), mask=leaving >= 0)
                tl.store(tl.max_contiguous(page_of_slot + at, 1), tl.full([BLOCK], -1, tl.int32), mask=at < num_slots)
        else:
            for start in range(0, budget, BUDGET_BLOCK):
                rank = start + ranks
                slot = tl.load(tl.max_contiguous(out_slots + rank, 1), mask=rank < budget, other=-1)
                tl.store(last_use + slot, stamps - rank, mask=slot >= 0)
        tl.debug_barrier()  # what is in use is stamped; or every slot is free

        if (num_absent > 0) & (not REPLACE):
            low = oldest
            high = newest
            while low < high:
                first_border, second_border = _borders(low, high)
                as_old_first = tl.full([], 0, tl.int32)
                as_old_second = tl.full([], 0, tl.int32)
                for start in range(0, num_slots, BLOCK):
                    at = start + first
                    age = _of_slots(last_use, at, num_slots, 2147483647)
                    more_first, more_second = _as_old(age, first_border, second_border)
                    as_old_first += more_first
                    as_old_second += more_second
                low, high = _narrowed(low, high, first_border, second_border, as_old_first, as_old_second, num_absent)

            freed_before = tl.full([], 0, tl.int32)
            for start in range(0, num_slots, BLOCK):
                at = start + first
                freed = _of_slots(last_use, at, num_slots, 2147483647) <= low
                leaving = tl.load(tl.max_contiguous(page_of_slot + at, 1), mask=freed, other=-1)
                _free(at, freed, leaving, freed_before, fetch_slots, slot_of_page, BLOCK)
                freed_before += tl.sum(freed.to(tl.int32), 0)
            tl.debug_barrier()  # the freed slots are listed

        absent_before = tl.full([], 0, tl.int32)
        for start in range(0, budget, BUDGET_BLOCK):
            rank = start + ranks
            page, absent = _selected(selection, rank, budget, num_pages)
            if not REPLACE:
                absent &= tl.load(tl.max_contiguous(out_slots + rank, 1), mask=rank < budget, other=-1) < 0
            place = absent_before + tl.cumsum(absent.to(tl.int32), 0) - 1
            if REPLACE:
                slot = place
                tl.store(fetch_slots + place, slot, mask=absent)
            else:
                slot = tl.load(fetch_slots + place, mask=absent, other=-1)
                tl.debug_barrier()  # all warps have read what is absent
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
    num_warps: int | None = None,
) -> Resolved:
    """Look `selection` up in `table`; for heads that missed, make room for what is not resident.

    `selection` is int32 [batch, num_kv_heads, budget], NO_PAGE anywhere, no page twice; pages outside the table count
    as NO_PAGE. `missed` is bool [batch, num_kv_heads]: other heads fetch nothing and their stamps stay. Of two pages
    used in the same step, the one later in the selection leaves first. The n-th page to fetch gets the n-th freed slot,
    in the order of slots. With `replace`, all pages of a head that missed leave, and all of its selection is fetched:
    the n-th page into slot n. Every element of the result is written. `num_warps` is for the bench to try others.
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
            kernel, options = variant(budget, num_slots, replace=replace)
            options |= {} if num_warps is None else {"num_warps": num_warps}
            kernel[(batch * heads,)](
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
                **options,
                **FUSED,
            )
    return out


def variant(budget: int, num_slots: int, *, replace: bool) -> tuple[Any, dict[str, Any]]:
    """A kernel, the sizes it is compiled for, and its warps: no thread needs more registers than it has."""
    if num_slots <= SLOT_BLOCK and not replace:
        block = triton.next_power_of_2(num_slots)
        return resolve_held_kernel, {
            "BUDGET_BLOCK": triton.next_power_of_2(budget),
            "BLOCK": block,
            "num_warps": max(4, min(8, block // 256)),
        }
    block = min(triton.next_power_of_2(num_slots), REPLACE_BLOCK if replace else LOOK_BLOCK)
    budget_block = min(triton.next_power_of_2(budget), BUDGET_BLOCK)
    return resolve_pages_kernel, {
        "BUDGET_BLOCK": budget_block,
        "BLOCK": block,
        "REPLACE": replace,
        "num_warps": 8 if max(block, budget_block) <= 2048 else 16,
    }
