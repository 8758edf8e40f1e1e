"""`resolve_pages` for page tables that CPU threads keep: the same result, numpy instead of one kernel.

A row takes some tens of microseconds where the reference, which is written to be read, takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clo_kernels.layout import NO_PAGE, NO_SLOT, PageTable, Resolved

Ints = NDArray[np.int32]


def resolve_pages(selection: torch.Tensor, missed: torch.Tensor, table: PageTable, *, out: Resolved) -> Resolved:
    """As `clo_kernels.resolve_pages` without `replace`, on tensors of the host. A row selects no page twice."""
    out.fetch_pages.fill_(NO_PAGE)
    out.fetch_slots.fill_(NO_SLOT)
    out.num_fetched.zero_()
    selected, slots, fetch_pages, fetch_slots = (
        tensor.numpy() for tensor in (selection, out.slots, out.fetch_pages, out.fetch_slots)
    )
    tables = [tensor.numpy() for tensor in (table.slot_of_page, table.page_of_slot, table.last_use)]
    for b, h in np.ndindex(*selection.shape[:2]):
        row = _Row(*(held[b, h] for held in tables))
        ranks = np.flatnonzero((selected[b, h] >= 0) & (selected[b, h] < len(row.slot_of_page)))
        wanted = selected[b, h, ranks]
        if bool(missed[b, h]) and len(wanted):
            pages, free = row.fetch(wanted)
            count = len(pages)
            fetch_pages[b, h, :count], fetch_slots[b, h, :count] = pages, free
            out.num_fetched[b, h] = count
            row.use(wanted, selection.shape[2] - ranks)
        slots[b, h] = NO_SLOT
        slots[b, h, ranks] = row.slot_of_page[wanted]
    return out


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """The page table of one KV head, changed in place."""

    slot_of_page: Ints
    page_of_slot: Ints
    last_use: Ints

    def fetch(self, wanted: Ints) -> tuple[Ints, Ints]:
        """Pages of `wanted` that are nowhere, and the slots that they take: the least recently used of the others."""
        held = self.slot_of_page[wanted]
        absent = wanted[held == NO_SLOT]
        free = self._oldest(len(absent), held[held != NO_SLOT])
        left = self.page_of_slot[free]
        self.slot_of_page[left[left != NO_PAGE]] = NO_SLOT
        self.page_of_slot[free], self.slot_of_page[absent] = absent, free
        return absent, free

    def _oldest(self, count: int, in_use: Ints) -> Ints:
        """Slots, ascending; of two that were used together the lower one counts as older."""
        num_slots = len(self.last_use)
        idle = np.ones(num_slots, dtype=bool)
        idle[in_use] = False
        by_age = (self.last_use.astype(np.int64) * num_slots + np.arange(num_slots))[idle]
        oldest = np.partition(by_age, count - 1)[:count] if 0 < count < len(by_age) else by_age[:count]
        return np.sort(oldest % num_slots).astype(np.int32)

    def use(self, wanted: Ints, ages: NDArray[np.int64]) -> None:
        """What was just asked for is newer than all there was, by so much."""
        self.last_use[self.slot_of_page[wanted]] = self.last_use.max() + ages
