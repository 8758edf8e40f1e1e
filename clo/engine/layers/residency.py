"""Which selected pages are in device slots, and which slots take the ones that are not.

The page table is the device's, or the CPU threads' where they resolve. Knows nothing about what pages hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo.engine.cuda.bar import Bar
from clo.engine.layers import host_resolve
from clo.engine.layers.selection import Selection
from clo.engine.layers.shape import LayerShape
from clo.engine.words import Words
from clo.schedule.ops import Stage
from clo.specs import Cache, Design, OnMiss, ResolveOn
from clo_kernels.layout import INT32, NO_SLOT, PageTable, Resolved


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Pages to move, int64 `[moves]`: rows of the host's pages and of the slots, both as `[rows, page values]`."""

    source: torch.Tensor
    target: torch.Tensor

    def __len__(self) -> int:
        return len(self.source)


class Residency:
    """The page table of one layer and what each stage found missing.

    `slots`: where the selected pages of each head are, `[batch, kv_heads, budget]`.
    """

    def __init__(
        self, design: Design, shape: LayerShape, selection: Selection, *, num_slots: int, num_pages: int
    ) -> None:
        self._design, self._selection = design, selection
        self._num_slots, self._num_pages = num_slots, num_pages
        self._kernels = shape.kernels
        self.table = PageTable.empty(*shape.rows, num_slots, num_pages, "cpu" if self.on_cpu else str(shape.device))
        self._found = {stage: Words(self._found_shapes(), shape.device) for stage in Stage}
        self.resolved = {stage: self._resolved(found.device) for stage, found in self._found.items()}
        self.slots = torch.full_like(selection.pages, NO_SLOT)

    def _found_shapes(self) -> dict[str, tuple[int, ...]]:
        listed = tuple(self._selection.pages.shape)
        found = {"fetch_pages": listed, "fetch_slots": listed, "num_fetched": listed[:2]}
        return found | ({"slots": listed} if self.on_cpu else {})

    def _resolved(self, words: dict[str, torch.Tensor]) -> Resolved:
        slots = words.get("slots")
        return Resolved(
            slots=torch.zeros_like(self._selection.pages) if slots is None else slots,
            fetch_pages=words["fetch_pages"],
            fetch_slots=words["fetch_slots"],
            num_fetched=words["num_fetched"],
        )

    @property
    def replaces(self) -> bool:
        """Whether what a head selects is fetched whole, resident or not."""
        return self._design.cache is Cache.NONE or self._design.on_miss is OnMiss.REPLACE

    @property
    def on_cpu(self) -> bool:
        """Whether CPU threads keep the page table."""
        return self._design.resolve_on is ResolveOn.CPU and self._design.offloads and not self.replaces

    def begin_with(self, sequence: int, pages: range) -> None:
        """The first slots of every head hold `pages`; the last of them was used last."""
        where = self.table.page_of_slot.device
        page, slot = torch.arange(pages.start, pages.stop, device=where), torch.arange(len(pages), device=where)
        self.table.page_of_slot[sequence, :, : len(pages)] = page.to(INT32)
        self.table.slot_of_page[sequence, :, pages.start : pages.stop] = slot.to(INT32)
        self.table.last_use[sequence, :, : len(pages)] = slot.to(INT32)

    def attend_selection(self) -> None:
        """Where every page has a slot of its own."""
        self.slots.copy_(self._selection.pages)

    def after_selection(self, stage: Stage, missed: torch.Tensor) -> None:
        """What `stage` chose is what is attended; a set that is replaced whole is looked up at once."""
        self.slots = self.resolved[stage].slots
        if self.replaces:
            self._look_up(stage, missed, replace=True)
        elif self.on_cpu:
            self._selection.letters[stage].device["missed"].copy_(missed)

    def resolve(self, stage: Stage, missed: torch.Tensor) -> None:
        """What of the selection is resident, what leaves, what is to be fetched."""
        if self.on_cpu:
            asked, found = self._selection.letters[stage].host, self._resolved(self._found[stage].host)
            host_resolve.resolve_pages(asked["chosen"], asked["missed"], self.table, out=found)
        elif not self.replaces:
            self._look_up(stage, missed, replace=False)

    def _look_up(self, stage: Stage, missed: torch.Tensor, *, replace: bool) -> None:
        chosen, out = self._selection.chosen[stage], self.resolved[stage]
        self._kernels.resolve_pages(chosen, missed, self.table, replace=replace, out=out)

    def letter(self, stage: Stage) -> Words:
        """What CPU threads must know before they resolve or move what `stage` chose."""
        return self._selection.letters[stage] if self.on_cpu else self._found[stage]

    def announce(self, stage: Stage) -> None:
        """What CPU threads resolved, to the device."""
        if self.on_cpu:
            self._found[stage].send()

    def announce_through(self, stage: Stage, bar: Bar) -> None:
        """The same by the CPU's own stores."""
        if self.on_cpu:
            words, first = self._found[stage], torch.zeros(1, dtype=torch.int64)
            bar.prepare(words.message[None])
            bar.write(words.message[None], first, words.mailbox[None], first)

    def fetches(self, stage: Stage) -> Moves:
        """What was found missing, as the host knows it."""
        found = self._found[stage].host
        listed = torch.arange(found["fetch_pages"].shape[2]) < found["num_fetched"][..., None]
        sequence, head, at = listed.nonzero(as_tuple=True)
        page, slot = (found[name][sequence, head, at].long() for name in ("fetch_pages", "fetch_slots"))
        heads = listed.shape[1]
        return Moves(
            source=(sequence * self._num_pages + page) * heads + head,
            target=(sequence * heads + head) * self._num_slots + slot,
        )

    def fetched_pages(self, stage: Stage) -> int:
        """Pages found missing; reads the device."""
        found = self._found[stage]
        return int((found.host if self.on_cpu else found.device)["num_fetched"].sum())
