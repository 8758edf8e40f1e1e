"""The cache of an offloaded layer: pages on the host, a budget of them attended through device slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clo.engine.counts import LayerCounts
from clo.engine.layers.gate import Gate
from clo.engine.layers.indexed import IndexerSelection, SharedSelection
from clo.engine.layers.page_format import PageFormat
from clo.engine.layers.residency import Residency
from clo.engine.layers.selection import Selection
from clo.engine.layers.shape import HeadSettings, LayerShape
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Cache, Design, IndexerSpec
from clo_kernels.layout import INT32, NO_PAGE, DeviceKV, ring_rows, window_start

FETCH_TOKENS = 8192
"""Pages of a prompt come back to the device in parts of this many tokens: what they pass through stays small."""


class OffloadedLayer:
    """Pages on the host, a budget of them attended through device slots.

    A page that leaves the window is stored to the host in that step and stays attended in the window until the next
    one: it has a whole step to arrive, whoever moves it. The first page is always attended (the sinks are in it), the
    pages between it and the window are the candidates of selection.

    In a model with an indexer of its own, that chooses pages (its shape is `indexer`), or a layer attends to what the
    one that it `follows` chose.

    `host_pages` is `[batch, pages, kv_heads, rows_per_token, page_size, head_dim]`. Where nothing is offloaded every
    page has a slot of its own, and these are the slots.
    """

    def __init__(
        self,
        plan: DecodePlan,
        shape: LayerShape,
        heads: HeadSettings,
        *,
        indexer: IndexerSpec | None = None,
        follows: OffloadedLayer | None = None,
    ) -> None:
        self.design, self.shape, self.heads, self.follows = plan.design, shape, heads, follows
        self.kernels = shape.kernels
        self.page_size = self.design.page_size
        num_pages = -(-shape.max_tokens // self.page_size)
        everything = self.design.cache is Cache.RESIDENT
        num_slots, budget = slots_and_budget(plan, num_pages)
        self.format = PageFormat(self.design.page_coding, shape.head_dim, shape.dtype)
        page = (shape.rows_per_token, self.page_size, self.format.width)
        size = (shape.batch, num_pages, shape.num_kv_heads, *page)
        self.kv = _device_kv(self.design, self.format, num_slots, shape, heads.pinned)
        self.host_pages = (
            self.kv.slots.transpose(1, 2)
            if everything
            else torch.zeros(size, dtype=self.format.kept_dtype, pin_memory=shape.apart)
        )
        # a page that leaves the window is attended there for one step more
        self.attended_kv = replace(self.kv, recent_tokens=self.kv.recent_tokens + 1)
        self.gate = Gate(self.design, shape, heads)
        self.selection = self._selection(num_pages, budget, indexer)
        self.residency = Residency(self.design, shape, self.selection, num_slots=num_slots, num_pages=num_pages)
        nowhere = self.host_pages.new_zeros((shape.batch, 0, shape.num_kv_heads, *page), device=shape.device)
        index = self.selection.of_pages
        self._nowhere = nowhere, None if index is None else index[:, :, :0].contiguous()
        self._selected: set[Stage] = set()
        self._attended: Stage | None = None
        self._last_selected: Stage | None = None
        self._leaving: list[tuple[int, int]] = []

    def _selection(self, num_pages: int, budget: int, indexer: IndexerSpec | None) -> Selection:
        sizes = {"num_pages": num_pages, "budget": budget}
        if not self.design.asks_indexer:
            return Selection(self.design, self.shape, **sizes)
        if self.follows is not None:
            return SharedSelection(self.design, self.shape, **sizes, source=self.follows.selection)
        assert indexer is not None
        return IndexerSelection(self.design, self.shape, **sizes, key_dim=indexer.head_dim)

    @property
    def counts(self) -> LayerCounts:
        """Reads the device."""
        moving = self._selected if self.design.offloads else set()
        chosen = None if self._attended is None else self.selection.chosen[self._attended]
        missed, fetched = self.gate.missed, self.residency.fetched_pages
        return LayerCounts(
            missed={stage: int(missed[stage].sum()) if stage in self._selected else 0 for stage in Stage},
            fetched={stage: fetched(stage) if stage in moving else 0 for stage in Stage},
            requested=0 if chosen is None else int((chosen != NO_PAGE).sum()),
            written_back=self.written_back_pages,
        )

    @property
    def written_back_pages(self) -> int:
        """Pages that leave the window for the host in this step."""
        leaving = len(self._leaving) if self.design.offloads else 0
        return leaving * (self.shape.num_kv_heads - len(self.heads.pinned))

    def begin(self, lengths: Sequence[int]) -> None:
        """A step begins in which each sequence has so many tokens, the new one included."""
        self.gate.begin()
        size, recent = self.page_size, self.kv.recent_tokens
        starts = [(window_start(n - 1, recent, size), window_start(n, recent, size)) for n in lengths]
        self._leaving = [(b, before // size) for b, (before, after) in enumerate(starts) if after > before]

    def exercise(self) -> None:
        """Use what a step may first need while a kernel polls on CUDA: code is loaded then, and the load would wait for
        the poll. Before the layer holds anything."""
        page = self._window_page(0, 0)
        self.selection.index_pages(0, 0, page[:, None, 0])
        self.host_pages[0, 0].copy_(self.format.kept(page), non_blocking=True)
        first = torch.zeros(1, dtype=torch.int64, device=self.shape.device)
        self.slot_rows.index_copy_(0, first, self.slot_rows[:1].clone())

    # ---- prompts

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in what the library keeps of a prompt (see `LayerShape.rows_of`); the last pages stay in slots."""
        full, kv = self.pages_of_prompt(keys.shape[1]), torch.stack(self.shape.rows_of(keys, values))
        self.load_pages(sequence, 0, kv[:, :, : full * self.page_size])
        self.load_rest(sequence, full, kv[:, :, full * self.page_size :])

    def pages_of_prompt(self, tokens: int) -> int:
        """Pages of a prompt that are not in the window when it has been read."""
        return window_start(tokens, self.kv.recent_tokens, self.page_size) // self.page_size

    def load_pages(self, sequence: int, first: int, kv: torch.Tensor) -> None:
        """Pages of a prompt from page `first` on, `[rows_per_token, kv_heads, tokens, head_dim]`: to the host, indexed.

        What is kept of them besides is kept now, as computed: coded pages do not come back as they were.
        """
        count = kv.shape[2] // self.page_size
        if not count:
            return
        pages = kv.unflatten(2, (count, self.page_size))
        # put in order where they are, so that what crosses the link is contiguous at both ends
        kept = self.format.kept(pages.permute(2, 1, 0, 3, 4))
        self.host_pages[sequence, first : first + count].copy_(kept)
        self.selection.index_pages(sequence, first, pages[0])
        self._keep(sequence, first * self.page_size, kv)

    def fetch_pages(self, sequence: int, count: int, out: torch.Tensor) -> None:
        """The first `count` pages into `out` `[rows_per_token, kv_heads, count * page_size, head_dim]`, on the
        device."""
        pages = self.host_pages[sequence]
        at_once = max(1, FETCH_TOKENS // self.page_size)
        for first in range(0, count, at_once):
            end = min(first + at_once, count)
            # contiguous on the host and so moved as it is; on the device it is put in order
            arrived = pages[first:end].to(self.shape.device, non_blocking=True)
            rows = out[:, :, first * self.page_size : end * self.page_size]
            restored = self.format.restored(arrived)
            rows.unflatten(2, (end - first, self.page_size)).copy_(restored.permute(2, 1, 0, 3, 4))

    def load_rest(self, sequence: int, full: int, kv: torch.Tensor) -> None:
        """Tokens behind the `full` pages of a prompt, `[rows_per_token, kv_heads, tokens, head_dim]`: it ends in the
        window."""
        start = full * self.page_size
        self._keep(sequence, start, kv)
        rows = torch.arange(start, start + kv.shape[2], device=kv.device) % self.kv.ring_tokens
        self.kv.window[sequence][:, :, rows] = kv.transpose(0, 1)
        if self.design.cache not in (Cache.RESIDENT, Cache.NONE):
            self._fill_slots(sequence, full)

    def load_indexer_keys(self, sequence: int, keys: torch.Tensor) -> None:
        """Those that the model's own indexer has of a prompt, `[tokens, key_dim]`, where that chooses."""
        if isinstance(self.selection, IndexerSelection):
            self.selection.load_keys(sequence, keys)

    def _keep(self, sequence: int, first: int, kv: torch.Tensor) -> None:
        """What stays on the device of a prompt's tokens from `first` on: those of pinned heads, sinks, exact keys."""
        end = first + kv.shape[2]
        for row, head in enumerate(self.heads.pinned):
            self.kv.pinned[sequence, row, :, first:end] = kv[:, head]
        self.selection.remember_prompt(sequence, first, kv[0])
        sinks = self.kv.sinks[sequence, :, :, first:end]
        sinks.copy_(kv[:, :, : sinks.shape[2]].transpose(0, 1))

    def _fill_slots(self, sequence: int, full: int) -> None:
        """The pages computed last are on the device already: they begin in the slots, the newest used last."""
        newest = range(min(full, max(1, full - self.kv.slots.shape[2])), full)
        self.residency.begin_with(sequence, newest)
        pages = self.host_pages[sequence, newest.start : newest.stop].to(self.shape.device)
        self.kv.slots[sequence, :, : len(newest)] = pages.transpose(0, 1)

    # ---- a decode step

    @property
    def host_rows(self) -> torch.Tensor:
        """The host's pages, head by head, `[rows, page values]`: a view."""
        return self.host_pages.view(self.host_pages.shape[:3].numel(), -1)

    @property
    def slot_rows(self) -> torch.Tensor:
        """The slots, `[rows, page values]`: a view."""
        return self.kv.slots.view(self.kv.slots.shape[:3].numel(), -1)

    def append(self, key: torch.Tensor, value: torch.Tensor | None, lengths: torch.Tensor, *, store: bool) -> None:
        """The new token into the window; without a `value` the key is both.

        With `store`, the page that leaves goes to the host by the same kernel.
        """
        self.selection.remember_token(key, lengths)
        planes = self.selection.planes
        if store:
            index = self.selection.of_pages
            self.kernels.append_kv(key, value, lengths, self.kv, self.host_pages, index, planes=planes)
            return
        self.kernels.append_kv(key, value, lengths, self.kv, *self._nowhere, planes=planes)
        for sequence, page in self._leaving:
            self.selection.index_pages(sequence, page, self._window_page(sequence, page)[:, None, 0])

    def _window_page(self, sequence: int, page: int) -> torch.Tensor:
        """`[kv_heads, rows_per_token, page_size, head_dim]`; pages lie whole in the ring."""
        first = page * self.page_size % self.kv.ring_tokens
        return self.kv.window[sequence, :, :, first : first + self.page_size].contiguous()

    def write_back(self) -> None:
        """Pages that left the window in this step, to the host."""
        for sequence, page in self._leaving:
            kept = self.format.kept(self._window_page(sequence, page))
            self.host_pages[sequence, page].copy_(kept, non_blocking=True)

    def score(self, stage: Stage, query: torch.Tensor, lengths: torch.Tensor, candidates: torch.Tensor) -> None:
        """Scores of the candidate pages of heads that missed."""
        self.selection.score(stage, query, lengths, candidates, self.gate.missed[stage])

    def select(self, stage: Stage, candidates: torch.Tensor) -> None:
        """The budget's best pages of heads that missed."""
        missed = self.gate.missed[stage]
        if self.follows is not None:
            missed.copy_(self.follows.gate.missed[stage])
        self.selection.select(stage, candidates, missed)
        self._selected.add(stage)
        self._last_selected = stage
        if self.design.cache is Cache.RESIDENT:
            self.residency.attend_selection()
        else:
            self.residency.after_selection(stage, missed)

    def resolve(self, stage: Stage) -> None:
        """What of the selection is resident, what leaves, what is to be fetched."""
        self.residency.resolve(stage, self.gate.missed[stage])

    def gather(self, stage: Stage) -> None:
        """What was found missing, from the host into its slots."""
        self.residency.announce(stage)
        resolved, programs = self.residency.resolved[stage], self.design.num_ctas
        self.kernels.gather_pages(self.host_pages, self.kv.slots, resolved, num_programs=programs)

    def attend(
        self, query: torch.Tensor, lengths: torch.Tensor, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention over sinks, window and the selected pages (pinned heads: over everything).

        `sink_logits` `[query_heads]` take their share of the softmax, and have no value.
        """
        self._attended = self._last_selected
        attended: torch.Tensor = self.kernels.sparse_decode_attention(
            query,
            self.attended_kv,
            self.residency.slots,
            lengths,
            scale=self.shape.scale,
            sink_logits=sink_logits,
            out=query.new_empty((*query.shape[:2], self.kv.value_width)),
        )
        return attended


def slots_and_budget(plan: DecodePlan, num_pages: int) -> tuple[int, int]:
    """Slots of a KV head, and pages that it selects, where there is room for `num_pages`.

    An indexer chooses as many tokens whatever the context: of one that was shorter when the plan was made, too.
    """
    design, selected = plan.design, plan.budget_pages
    if design.asks_indexer and design.budget_pages is not None:
        selected = min(design.budget_pages, num_pages)
    if design.cache is Cache.RESIDENT:
        return num_pages, max(1, min(selected, num_pages))
    slots = max(1, min(max(plan.slot_pages, selected), num_pages))
    return slots, max(1, min(selected, slots))


def _device_kv(
    design: Design, pages: PageFormat, num_slots: int, shape: LayerShape, pinned: tuple[int, ...]
) -> DeviceKV:
    on_device = {"dtype": shape.dtype, "device": shape.device}
    page_size, recent_tokens, head_dim = design.page_size, design.recent_window_tokens, shape.head_dim
    rows = shape.rows_per_token
    slots = (*shape.rows, num_slots, rows, page_size, pages.width)
    ring = ring_rows(recent_tokens + 1, page_size)
    pinned_row = torch.full((shape.num_kv_heads,), -1, dtype=INT32, device=shape.device)
    for row, head in enumerate(pinned):
        pinned_row[head] = row
    return DeviceKV(
        sinks=torch.zeros((*shape.rows, rows, page_size, head_dim), **on_device),
        window=torch.zeros((*shape.rows, rows, ring, head_dim), **on_device),
        slots=torch.zeros(slots, dtype=pages.kept_dtype, device=shape.device),
        pinned=torch.zeros((shape.batch, len(pinned), rows, shape.max_tokens, head_dim), **on_device),
        pinned_row=pinned_row,
        recent_tokens=recent_tokens,
        value_dim=shape.value_dim,
    )
