"""The KV cache of one layer: pages on the host, what of it is on the device, and the operations on both.

Three kinds, by what the design does with the layer: everything on the device (dense), everything copied in every step
(streamed), or a budget of pages fetched per KV head (offloaded). An operation here is what the schedule's operation of
the same name does; this knows nothing about their order, threads or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clo.engine.counts import Counts
from clo.engine.kernels import kernels_for
from clo.engine.words import Words, two_memories, wait_for_device
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Cache, OnMiss, ResolveOn, Selector
from clo_kernels import reference
from clo_kernels.layout import INT32, NO_PAGE, NO_SLOT, DeviceKV, PageTable, Resolved, ring_rows, window_start
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes, page_index

NEVER = float("-inf")
"""The threshold of a head that never selects."""
FETCH_TOKENS = 512
"""Pages of a prompt come back to the device in parts of this many tokens: what they pass through stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one layer's cache. `max_tokens` counts a sequence's prompt and all that it will generate.

    `recorded`: a step is recorded once and replayed, so that its device work must be the same whatever the lengths.
    """

    batch: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    recorded: bool = False

    @property
    def apart(self) -> bool:
        """Whether the host's pages lie in another memory than the device's."""
        return two_memories(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """What the head profile decides for one layer. Shapes: [kv_heads], [query_heads].

    With a `refresh_rate` a clock decides instead of the gate: each head selects in that share of the steps.
    """

    tau: torch.Tensor
    importance: torch.Tensor | None = None
    pinned: tuple[int, ...] = ()
    refresh_rate: float | None = None


class DenseLayer:
    """Keys and values of every token on the device."""

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        size = (shape.batch, shape.num_kv_heads, 2, shape.max_tokens, shape.head_dim)
        self.kv = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        # a kernel reads lengths on the device; torch's attention wants them, or a mask, from the host
        self.by_kernel = shape.apart
        self._kernels, self._pinned = kernels_for(shape.device), _as_pinned(self.kv)
        self._no_slots = torch.full((shape.batch, shape.num_kv_heads, 1), NO_SLOT, dtype=INT32, device=shape.device)
        self._tokens: list[int] = []

    @property
    def counts(self) -> Counts:
        """Nothing moves."""
        return Counts()

    def begin(self, lengths: Sequence[int]) -> None:
        """A step begins in which each sequence has so many tokens, the new one included."""
        self._tokens = list(lengths)

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Take in rotated keys and values of a prompt from token `first` on, `[kv_heads, tokens, head_dim]`."""
        self.kv[sequence, :, 0, first : first + keys.shape[1]] = keys
        self.kv[sequence, :, 1, first : first + keys.shape[1]] = values

    def append(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> None:
        """Store the new token of each sequence, `[batch, kv_heads, head_dim]`, as token `lengths - 1`."""
        rows = torch.arange(len(lengths), device=self.kv.device)
        self.kv[rows, :, 0, lengths.long() - 1] = key
        self.kv[rows, :, 1, lengths.long() - 1] = value

    def attend(self, query: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Full attention of `query` `[batch, query_heads, head_dim]`, of the same shape."""
        if self.by_kernel:
            return self._attend_by_kernel(query, lengths)
        longest = max(self._tokens)
        keys, values = self.kv[:, :, 0, :longest], self.kv[:, :, 1, :longest]
        mask = torch.arange(longest, device=lengths.device)[None, :] < lengths[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None],
            keys,
            values,
            attn_mask=mask[:, None, None],
            scale=self.shape.scale,
            enable_gqa=self.shape.num_query_heads != self.shape.num_kv_heads,
        )
        return attended[:, :, 0]

    def _attend_by_kernel(self, query: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The same, with every head a pinned one."""
        attended: torch.Tensor = self._kernels.sparse_decode_attention(
            query, self._pinned, self._no_slots, lengths, scale=self.shape.scale, out=torch.empty_like(query)
        )
        return attended


class StreamedLayer(DenseLayer):
    """Everything on the host, and a device buffer into which all of it is copied in every step.

    A new token is staged in host memory by the step that computed it, and takes its place when the next one begins.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.host = torch.zeros(self.kv.shape, dtype=shape.dtype, pin_memory=shape.apart)
        newest = (2, shape.batch, shape.num_kv_heads, shape.head_dim)
        self._newest = torch.zeros(newest, dtype=shape.dtype, pin_memory=shape.apart)
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._copied: Stage | None = None

    @property
    def counts(self) -> Counts:
        """Everything is asked for and moved."""
        if self._copied is None:
            return Counts()
        pages = self._copied_pages * self.shape.num_kv_heads
        return Counts(fetched=dict.fromkeys(Stage, 0) | {self._copied: pages}, requested=pages)

    @property
    def copied_tokens(self) -> int:
        """Tokens that a step brings, summed over the batch."""
        return self.shape.batch * self.shape.max_tokens if self.shape.recorded else sum(self._tokens) - self.shape.batch

    def begin(self, lengths: Sequence[int]) -> None:
        wait_for_device(self.shape.device)
        for sequence, tokens in enumerate(self._tokens):
            self.host[sequence, :, :, tokens - 1] = self._newest[:, sequence].transpose(0, 1)
        super().begin(lengths)

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        self.host[sequence, :, 0, first : first + keys.shape[1]] = keys
        self.host[sequence, :, 1, first : first + keys.shape[1]] = values

    def fetch(self, sequence: int, out: torch.Tensor) -> None:
        """The first tokens of the host's copy, as many as `out` `[2, kv_heads, tokens, head_dim]` has room for."""
        # head by head, where the host's copy is contiguous: a copy engine moves it as it is
        for head in range(self.shape.num_kv_heads):
            for part in range(2):
                out[part, head].copy_(self.host[sequence, head, part, : out.shape[2]], non_blocking=True)

    def append(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> None:
        """The new token goes into the buffer now, and to the host for the next step."""
        self._new = key, value
        super().append(key, value, lengths)
        for staged, new in zip(self._newest, self._new, strict=True):
            staged.copy_(new, non_blocking=True)

    def copy(self, stage: Stage, page_size: int) -> None:
        """Bring all tokens but the newest, which is only now being computed; a recorded step the whole buffer."""
        self._copied, self._page_size = stage, page_size
        if self.shape.recorded:
            self.kv.copy_(self.host, non_blocking=True)
            return
        for sequence, tokens in enumerate(self._tokens):
            for head in range(self.shape.num_kv_heads):
                for part in range(2):  # contiguous runs: a copy engine takes them as they are
                    target = self.kv[sequence, head, part, : tokens - 1]
                    target.copy_(self.host[sequence, head, part, : tokens - 1], non_blocking=True)

    @property
    def _copied_pages(self) -> int:
        return sum(-(-(tokens - 1) // self._page_size) for tokens in self._tokens)

    def attend(self, query: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.shape.recorded:
            assert self._new is not None
            DenseLayer.append(self, *self._new, lengths)  # the copy went over it
        return super().attend(query, lengths)


class OffloadedLayer:
    """Pages on the host, a budget of them attended through device slots.

    A page that leaves the window is stored to the host in that step and stays attended in the window until the next
    one: it has a whole step to arrive, whoever moves it. The first page is always attended (the sinks are in it), the
    pages between it and the window are the candidates of selection.
    """

    def __init__(self, plan: DecodePlan, shape: LayerShape, heads: HeadSettings) -> None:
        self.plan, self.design, self.shape, self.heads = plan, plan.design, shape, heads
        self.kernels = kernels_for(shape.device)
        self.page_size = self.design.page_size
        self.num_pages = -(-shape.max_tokens // self.page_size)
        rows = (shape.batch, shape.num_kv_heads)
        on_device = {"dtype": shape.dtype, "device": shape.device}
        page = (2, self.page_size, shape.head_dim)
        self.host_pages = torch.zeros(
            (shape.batch, self.num_pages, shape.num_kv_heads, *page),
            dtype=shape.dtype,
            pin_memory=shape.apart,
        )
        everything = self.design.cache is Cache.RESIDENT
        self.num_slots = self.num_pages if everything else max(1, min(self.plan.slot_pages, self.num_pages))
        self.budget = max(1, min(self.plan.budget_pages, self.num_slots))
        ring = ring_rows(self.design.recent_window_tokens + 1, self.page_size)
        self.kv = DeviceKV(
            sinks=torch.zeros((*rows, 2, self.page_size, shape.head_dim), **on_device),
            window=torch.zeros((*rows, 2, ring, shape.head_dim), **on_device),
            slots=torch.zeros((*rows, self.num_slots, *page), **on_device),
            pinned=torch.zeros((shape.batch, len(heads.pinned), 2, shape.max_tokens, shape.head_dim), **on_device),
            pinned_row=_pinned_rows(heads.pinned, shape),
            recent_tokens=self.design.recent_window_tokens,
        )
        self.attended_kv = _with_window(self.kv, self.design.recent_window_tokens + 1)
        entry = entry_shape(self.index_kind, self.page_size, shape.head_dim)
        kept = {"dtype": INT32 if self.index_kind.of_tokens else shape.dtype, "device": shape.device}
        self.index = torch.zeros((*rows, self.num_pages, *entry), **kept)
        hashed = self.index_kind is IndexKind.SIGN_HASH
        self.planes = hash_planes(shape.head_dim).to(shape.device) if hashed else None
        where = "cpu" if self.resolves_on_cpu else str(shape.device)
        self.table = PageTable.empty(*rows, self.num_slots, self.num_pages, where)
        self.anchor = torch.zeros((shape.batch, shape.num_query_heads, shape.head_dim), **on_device)
        self.tau = heads.tau.to(shape.device, torch.float32).clone()
        self.tau[list(heads.pinned)] = NEVER
        self.selection = torch.full((*rows, self.budget), NO_PAGE, dtype=INT32, device=shape.device)
        # what each stage chose: it is looked up and fetched while the other stage may already be choosing anew
        self._asked = {stage: Words({"chosen": (*rows, self.budget), "missed": rows}, shape.device) for stage in Stage}
        self.chosen = {stage: asked.device["chosen"].fill_(NO_PAGE) for stage, asked in self._asked.items()}
        self.missed = {stage: torch.zeros(rows, dtype=torch.bool, device=shape.device) for stage in Stage}
        self.scores = {
            stage: torch.full((*rows, self.num_pages), NEVER, dtype=torch.float32, device=shape.device)
            for stage in Stage
        }
        self._found = {stage: Words(self._found_shapes(), shape.device) for stage in Stage}
        self.resolved = {stage: self._resolved(found.device) for stage, found in self._found.items()}
        self.slots_attended = torch.full_like(self.selection, NO_SLOT)
        no_pages = (shape.batch, 0, shape.num_kv_heads, *page)
        self._nowhere = torch.zeros(no_pages, **on_device), self.index[:, :, :0].contiguous()
        self._importance = None if heads.importance is None else heads.importance.to(shape.device)
        self._selected: set[Stage] = set()
        self._attended: Stage | None = None
        self._last_selected: Stage | None = None
        self._leaving: list[tuple[int, int]] = []
        self._steps = self._clocked = 0

    def _found_shapes(self) -> dict[str, tuple[int, ...]]:
        listed = (self.shape.batch, self.shape.num_kv_heads, self.budget)
        found = {"fetch_pages": listed, "fetch_slots": listed, "num_fetched": listed[:2]}
        return found | ({"slots": listed} if self.resolves_on_cpu else {})

    def _resolved(self, words: dict[str, torch.Tensor]) -> Resolved:
        slots = words.get("slots")
        return Resolved(
            slots=torch.zeros_like(self.selection) if slots is None else slots,
            fetch_pages=words["fetch_pages"],
            fetch_slots=words["fetch_slots"],
            num_fetched=words["num_fetched"],
        )

    @property
    def index_kind(self) -> IndexKind:
        """What the index holds of a page; the exact selector does not read it."""
        selector = self.design.selector
        return IndexKind.PAGE_MEAN if selector is Selector.EXACT else IndexKind(selector.value)

    @property
    def _fetches_everything(self) -> bool:
        """Whether what a head selects is fetched whole, resident or not."""
        return self.design.cache is Cache.NONE or self.design.on_miss is OnMiss.REPLACE

    @property
    def resolves_on_cpu(self) -> bool:
        """Whether CPU threads keep the page table."""
        return self.design.resolve_on is ResolveOn.CPU and self.design.offloads and not self._fetches_everything

    @property
    def counts(self) -> Counts:
        """Reads the device."""
        moving = self._selected if self.design.offloads else set()
        attended = 0 if self._attended is None else int((self.chosen[self._attended] != NO_PAGE).sum())
        return Counts(
            missed={stage: int(self.missed[stage].sum()) if stage in self._selected else 0 for stage in Stage},
            fetched={stage: self.fetched_pages(stage) if stage in moving else 0 for stage in Stage},
            requested=attended,
            written_back=self.written_back_pages,
        )

    @property
    def written_back_pages(self) -> int:
        """Pages that leave the window in this step."""
        return len(self._leaving) * (self.shape.num_kv_heads - len(self.heads.pinned))

    def begin(self, lengths: Sequence[int]) -> None:
        """A step begins in which each sequence has so many tokens, the new one included."""
        self._steps += 1
        size, recent = self.page_size, self.kv.recent_tokens
        starts = [(window_start(n - 1, recent, size), window_start(n, recent, size)) for n in lengths]
        self._leaving = [(b, before // size) for b, (before, after) in enumerate(starts) if after > before]

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in a prompt's rotated keys and values, `[kv_heads, tokens, head_dim]`; the last pages stay in slots."""
        start = self.pages_of_prompt(keys.shape[1]) * self.page_size
        self.load_pages(sequence, 0, torch.stack([keys[:, :start], values[:, :start]]))
        self.load_rest(sequence, keys, values)

    def pages_of_prompt(self, tokens: int) -> int:
        """Pages of a prompt that are not in the window when it has been read."""
        return window_start(tokens, self.kv.recent_tokens, self.page_size) // self.page_size

    def load_pages(self, sequence: int, first: int, kv: torch.Tensor) -> None:
        """Pages of a prompt from page `first` on, `[2, kv_heads, tokens, head_dim]`: to the host and indexed."""
        count = kv.shape[2] // self.page_size
        if not count:
            return
        pages = kv.unflatten(2, (count, self.page_size))
        # put in order where they are, so that what crosses the link is contiguous at both ends
        self.host_pages[sequence, first : first + count].copy_(pages.permute(2, 1, 0, 3, 4))
        self.index[sequence, :, first : first + count] = page_index(pages[0], self.index_kind, self.planes)
        if self.design.cache is Cache.RESIDENT:
            self.kv.slots[sequence, :, first : first + count] = pages.permute(1, 2, 0, 3, 4)

    def fetch_pages(self, sequence: int, count: int, out: torch.Tensor) -> None:
        """The first `count` pages into `out` `[2, kv_heads, count * page_size, head_dim]`, on the device."""
        resident = self.design.cache is Cache.RESIDENT
        pages = self.kv.slots[sequence].transpose(0, 1) if resident else self.host_pages[sequence]
        at_once = max(1, FETCH_TOKENS // self.page_size)
        for first in range(0, count, at_once):
            end = min(first + at_once, count)
            # contiguous on the host and so moved as it is; on the device it is put in order
            arrived = pages[first:end].to(self.shape.device, non_blocking=True)
            rows = out[:, :, first * self.page_size : end * self.page_size]
            rows.unflatten(2, (end - first, self.page_size)).copy_(arrived.permute(2, 1, 0, 3, 4))

    def load_rest(self, sequence: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What of a whole prompt `[kv_heads, tokens, head_dim]` is on the device; its pages are on the host already."""
        tokens = keys.shape[1]
        for row, head in enumerate(self.heads.pinned):
            self.kv.pinned[sequence, row, 0, :tokens] = keys[head]
            self.kv.pinned[sequence, row, 1, :tokens] = values[head]
        full = self.pages_of_prompt(tokens)
        start = full * self.page_size
        if self.design.selector is Selector.EXACT:
            self._remember_keys(sequence, keys)
        count = min(self.kv.sinks.shape[3], tokens)
        kept = torch.arange(start, tokens, device=keys.device)
        for part, of_prompt in enumerate((keys, values)):
            self.kv.sinks[sequence, :, part, :count] = of_prompt[:, :count]
            self.kv.window[sequence, :, part][:, kept % self.kv.ring_tokens] = of_prompt[:, kept]
        if self.design.cache not in (Cache.RESIDENT, Cache.NONE):
            self._fill_slots(sequence, full)

    def _remember_keys(self, sequence: int, keys: torch.Tensor) -> None:
        if not hasattr(self, "keys"):
            size = (self.shape.batch, self.shape.num_kv_heads, self.shape.max_tokens, self.shape.head_dim)
            self.keys = torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)
        self.keys[sequence, :, : keys.shape[1]] = keys

    def _fill_slots(self, sequence: int, full: int) -> None:
        """The pages computed last are on the device already: they begin in the slots, the newest used last."""
        newest = range(max(1, full - self.num_slots), full)
        for slot, page in enumerate(newest):
            self.table.page_of_slot[sequence, :, slot] = page
            self.table.slot_of_page[sequence, :, page] = slot
            self.table.last_use[sequence, :, slot] = slot
            self.kv.slots[sequence, :, slot] = self.host_pages[sequence, page].to(self.shape.device)

    def append(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor, *, store: bool) -> None:
        """The new token into the window. With `store`, the page that leaves goes to the host by the same kernel."""
        if self.design.selector is Selector.EXACT:
            rows = torch.arange(len(lengths), device=key.device)
            self.keys[rows, :, lengths.long() - 1] = key
        if store:
            self.kernels.append_kv(key, value, lengths, self.kv, self.host_pages, self.index, planes=self.planes)
            if self.design.cache is Cache.RESIDENT:
                self._keep_on_device(lengths)
            return
        self.kernels.append_kv(key, value, lengths, self.kv, *self._nowhere, planes=self.planes)
        for sequence, page in self._leaving:
            keys = self._window_page(sequence, page)[:, 0]
            self.index[sequence, :, page] = page_index(keys, self.index_kind, self.planes)

    def _keep_on_device(self, lengths: torch.Tensor) -> None:
        """Where nothing is offloaded, the page that leaves the window is a slot's from now on: its own."""
        size, recent = self.page_size, self.kv.recent_tokens
        before, after = ((lengths.long() - less - recent).clamp(min=0) // size for less in (1, 0))
        rows = (before[:, None] * size + torch.arange(size, device=lengths.device)) % self.kv.ring_tokens
        batch = torch.arange(self.shape.batch, device=lengths.device)
        leaving = self.kv.window[batch[:, None], :, :, rows].permute(0, 2, 3, 1, 4)
        held = self.kv.slots[batch, :, before]
        self.kv.slots[batch, :, before] = torch.where((after > before)[:, None, None, None, None], leaving, held)

    def _window_page(self, sequence: int, page: int) -> torch.Tensor:
        """`[kv_heads, 2, page_size, head_dim]`; pages lie whole in the ring."""
        first = page * self.page_size % self.kv.ring_tokens
        return self.kv.window[sequence, :, :, first : first + self.page_size].contiguous()

    def write_back(self) -> None:
        """Pages that left the window in this step, to the host."""
        for sequence, page in self._leaving:
            self.host_pages[sequence, page].copy_(self._window_page(sequence, page), non_blocking=True)

    def test(self, stage: Stage, query: torch.Tensor) -> None:
        """Which heads must select anew: those whose query has drifted from its anchor."""
        if self.heads.refresh_rate is not None:
            self._by_clock(stage, self.heads.refresh_rate)
            return
        fold, importance = self.design.gqa_fold.value, self._importance
        self.kernels.hit_test(query, self.anchor, self.tau, fold=fold, importance=importance, out=self.missed[stage])

    def _by_clock(self, stage: Stage, rate: float) -> None:
        """Heads take turns: head h selects when `steps * rate + h / heads` passes a whole number; all in the first.

        Only the first test of a step counts.
        """
        step = self._steps
        phase = torch.arange(self.shape.num_kv_heads) / self.shape.num_kv_heads
        due = ((step * rate + phase).floor() > ((step - 1) * rate + phase).floor()) | (step == 1)
        due &= torch.tensor(step > self._clocked)
        self._clocked = step
        self.missed[stage].copy_((due.to(self.shape.device) & (self.tau != NEVER)).expand_as(self.missed[stage]))

    def everyone_misses(self, stage: Stage) -> None:
        """Without a gate every head selects, but for the pinned ones."""
        self.missed[stage].copy_((self.tau != NEVER).expand_as(self.missed[stage]))

    def the_others_miss(self, query: torch.Tensor) -> None:
        """Heads that were not corrected choose, by this step's query, what the next step attends."""
        rest = ~self.missed[Stage.DEMAND] & (self.tau != NEVER)
        self.missed[Stage.PREFETCH].copy_(rest)
        group = self.shape.num_query_heads // self.shape.num_kv_heads
        moved = rest.repeat_interleave(group, dim=1)[..., None]
        self.anchor.copy_(torch.where(moved, query, self.anchor))

    def score(self, stage: Stage, query: torch.Tensor, lengths: torch.Tensor) -> None:
        """Scores of the candidate pages of heads that missed."""
        candidates, missed = self.candidates(lengths), self.missed[stage]
        if self.design.selector is Selector.EXACT:
            self._score_exactly(stage, query, lengths, candidates)
        else:
            self.kernels.score_pages(
                query,
                self.index,
                candidates,
                missed,
                scale=self.shape.scale,
                planes=self.planes,
                out=self.scores[stage],
            )

    def candidates(self, lengths: torch.Tensor) -> torch.Tensor:
        """Pages 1 to this number may be selected, int32 `[batch]`."""
        start = (lengths - self.attended_kv.recent_tokens).clamp(min=0) // self.page_size
        return (start - 1).clamp(min=0).to(INT32)

    def _score_exactly(
        self, stage: Stage, query: torch.Tensor, lengths: torch.Tensor, candidates: torch.Tensor
    ) -> None:
        """Attention mass of each page, mean over the group: what an oracle would fetch."""
        grouped = query.float().unflatten(1, (self.shape.num_kv_heads, -1))
        for b, length in enumerate(lengths.tolist()):
            mass = (
                (grouped[b] @ self.keys[b, :, :length].float().transpose(1, 2) * self.shape.scale).softmax(-1).mean(1)
            )
            count, size = int(candidates[b]), self.page_size
            scores = torch.full_like(self.scores[stage][b], NEVER)
            scores[:, 1 : count + 1] = mass[:, size : (count + 1) * size].unflatten(1, (count, size)).sum(-1)
            missed = self.missed[stage][b]
            self.scores[stage][b, missed] = scores[missed]

    def select(self, stage: Stage, lengths: torch.Tensor) -> None:
        """The budget's best pages of heads that missed."""
        missed = self.missed[stage]
        self.kernels.select_pages(self.scores[stage], self.candidates(lengths), missed, self.selection)
        self.chosen[stage].copy_(self.selection)
        self._selected.add(stage)
        self._last_selected = stage
        if self.design.cache is Cache.RESIDENT:
            self.slots_attended.copy_(self.selection)
            return
        self.slots_attended = self.resolved[stage].slots
        if self._fetches_everything:
            self._look_up(stage, replace=True)
        elif self.resolves_on_cpu:
            self._asked[stage].device["missed"].copy_(missed)

    def resolve(self, stage: Stage) -> None:
        """What of the selection is resident, what leaves, what is to be fetched."""
        if self.resolves_on_cpu:
            asked, found = self._asked[stage].host, self._resolved(self._found[stage].host)
            reference.resolve_pages(asked["chosen"], asked["missed"].bool(), self.table, out=found)
        elif not self._fetches_everything:
            self._look_up(stage, replace=False)

    def _look_up(self, stage: Stage, *, replace: bool) -> None:
        chosen, missed, out = self.chosen[stage], self.missed[stage], self.resolved[stage]
        self.kernels.resolve_pages(chosen, missed, self.table, replace=replace, out=out)

    def letter(self, stage: Stage) -> Words:
        """What CPU threads must know before they resolve or move what `stage` chose."""
        return self._asked[stage] if self.resolves_on_cpu else self._found[stage]

    def announce(self, stage: Stage) -> None:
        """What CPU threads resolved, to the device."""
        if self.resolves_on_cpu:
            self._found[stage].send()

    def gather(self, stage: Stage) -> None:
        """What was found missing, from the host into its slots."""
        self.announce(stage)
        self.kernels.gather_pages(
            self.host_pages, self.kv.slots, self.resolved[stage], num_programs=self.design.num_ctas
        )

    def fetches(self, stage: Stage) -> list[tuple[int, int, int, int]]:
        """(sequence, KV head, page, slot) of what was found missing, as the host knows it."""
        found, moves = self._found[stage].host, []
        for b, h in found["num_fetched"].nonzero().tolist():
            count = int(found["num_fetched"][b, h])
            pages, slots = (found[name][b, h, :count].tolist() for name in ("fetch_pages", "fetch_slots"))
            moves += [(b, h, page, slot) for page, slot in zip(pages, slots, strict=True)]
        return moves

    def fetched_pages(self, stage: Stage) -> int:
        """Pages found missing; reads the device."""
        found = self._found[stage]
        return int((found.host if self.resolves_on_cpu else found.device)["num_fetched"].sum())

    def attend(self, query: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Attention over sinks, window and the selected pages (pinned heads: over everything)."""
        self._attended = self._last_selected
        attended: torch.Tensor = self.kernels.sparse_decode_attention(
            query,
            self.attended_kv,
            self.slots_attended,
            lengths,
            scale=self.shape.scale,
            out=torch.empty_like(query),
        )
        return attended


Layer = DenseLayer | StreamedLayer | OffloadedLayer


def _pinned_rows(pinned: tuple[int, ...], shape: LayerShape) -> torch.Tensor:
    rows = torch.full((shape.num_kv_heads,), -1, dtype=INT32, device=shape.device)
    for row, head in enumerate(pinned):
        rows[head] = row
    return rows


def _with_window(kv: DeviceKV, recent_tokens: int) -> DeviceKV:
    return DeviceKV(
        sinks=kv.sinks,
        window=kv.window,
        slots=kv.slots,
        pinned=kv.pinned,
        pinned_row=kv.pinned_row,
        recent_tokens=recent_tokens,
    )


def _as_pinned(kv: torch.Tensor) -> DeviceKV:
    """Keys and values of every token, `[batch, kv_heads, 2, tokens, head_dim]`, as those of pinned heads only."""
    batch, heads, _, _, head_dim = kv.shape
    none = {"dtype": kv.dtype, "device": kv.device}
    return DeviceKV(
        sinks=torch.zeros((batch, heads, 2, 0, head_dim), **none),
        window=torch.zeros((batch, heads, 2, 2, head_dim), **none),
        slots=torch.zeros((batch, heads, 0, 2, 1, head_dim), **none),
        pinned=kv,
        pinned_row=torch.arange(heads, dtype=INT32, device=kv.device),
        recent_tokens=1,
    )
