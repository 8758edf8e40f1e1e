"""Lets recorded heads stand for the heads of a model, a batch and a context. Knows nothing about time.

A trace of the very model replays head by head. For another model, each KV head of each sequence draws a recorded head
from the same relative depth, and page counts are scaled so that budgets match (see docs/stand-in.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError, TraceError
from clo.plan import DecodePlan
from clo.specs import Attend
from clo.trace import AttentionTrace, TraceHeader
from clo.traffic import Counts, Traffic
from clo_sim.replay import HeadHistory, Policy, fewest_pages, policy_of, replay

Key = TypeVar("Key")
Value = TypeVar("Value")

DISTINCT_STEPS = 1024
"""Measured steps that are told apart: what a longer run needs beyond them is taken to repeat them."""

DEPTH_RADIUS = 1
"""A head may stand for heads one recorded layer up or down: nine candidates with SmolLM2's three KV heads."""


class TrafficSource:
    """A trace with the replays made of it so far (the oldest of more than `max_replays` are forgotten).

    `resample_heads` lets recorded heads stand for the heads of another model; without it the head counts must agree.
    `repeat_steps` lets a run be longer than the trace: its steps then stand for all that follow.
    """

    def __init__(
        self,
        trace: AttentionTrace,
        *,
        resample_heads: bool = True,
        repeat_steps: bool = False,
        max_replays: int = 512,
    ) -> None:
        self.trace = trace
        self.resample_heads = resample_heads
        self.repeat_steps = repeat_steps
        self._max_replays = max_replays
        self._replays: OrderedDict[Policy, HeadHistory] = OrderedDict()
        self._traffics: OrderedDict[tuple[object, ...], Traffic] = OrderedDict()
        self._fewest: OrderedDict[tuple[object, ...], NDArray[np.int32]] = OrderedDict()

    def traffic(self, plan: DecodePlan) -> Traffic:
        """Counts of `plan`, `[steps, layers]`, of at most `DISTINCT_STEPS` steps: memory does not grow beyond them.

        Raises `SpecError`/`TraceError` when the trace cannot serve the plan.
        """
        if not plan.design.offloads:
            return _nothing_moves(plan)
        if plan.design.attend is Attend.FULL:
            return _everything_moves(plan)
        self.check(plan)
        policy = policy_of(plan, self.trace)
        # designs that differ only in how pages move share their counts
        key = (
            policy,
            plan.model,
            plan.machine.tensor_parallel,
            plan.sequences,
            plan.workload,
            plan.budget_pages,
            plan.num_pages,
            plan.dense_layers,
            plan.pinned_heads_per_layer,
            plan.design.page_size,
            plan.design.selector,
        )
        return _remembered(self._traffics, key, 32, lambda: _stand_in(plan, self.trace, policy, self._replayed(policy)))

    def fewest_fetched_pages(self, plan: DecodePlan) -> float:
        """Mean pages a step that no exact design with this plan's slots can avoid (Belady), whole batch."""
        self.check(plan)
        policy, measured = policy_of(plan, self.trace), _measured(plan, self.trace.header)
        key = (policy.selector, policy.budget_pages, policy.slot_pages, measured.start, measured.stop)
        fewest = _remembered(self._fewest, key, 32, lambda: fewest_pages(self.trace, policy, measured))
        fetched = fewest.mean(axis=0)
        drawn = _draw_heads(plan, self.trace.header)
        drawn = drawn[_offloaded(plan, self.trace.header, drawn, self._replayed(policy))]
        return float(fetched[drawn].sum()) * plan.budget_pages / policy.budget_pages

    def check(self, plan: DecodePlan) -> None:
        """Whether the trace has the steps and may stand for the model."""
        header, workload = self.trace.header, plan.workload
        needed = workload.warmup_steps + (1 if self.repeat_steps else workload.steps)
        if needed > header.num_steps:
            raise SpecError(
                f"workload.steps = {workload.steps}: with workload.warmup_steps = {workload.warmup_steps} it exceeds "
                f"the {header.num_steps} recorded steps of the trace: lower it, or use a synthetic trace (--synthetic)"
            )
        if not self.resample_heads and not _same_heads(plan, header):
            raise TraceError(
                f"trace of {header.model}: {_part(header.num_layers, header.layers_of_model)} layers x "
                f"{header.num_kv_heads} KV heads, but {plan.model.name} has "
                f"{_part(len(plan.model.whole_layers), plan.model.num_layers)} x {plan.kv_heads_of_all}: record a "
                "trace of this model, or let recorded heads stand for others with --resample-heads"
            )

    def _replayed(self, policy: Policy) -> HeadHistory:
        return _remembered(self._replays, policy, self._max_replays, lambda: replay(self.trace, policy))


def _remembered(kept: OrderedDict[Key, Value], key: Key, limit: int, compute: Callable[[], Value]) -> Value:
    """The value of `key`, computed the first time; of more than `limit` the least recently used are forgotten."""
    if key not in kept:
        kept[key] = compute()
        if len(kept) > limit:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _distinct_steps(plan: DecodePlan) -> int:
    return min(plan.workload.steps, DISTINCT_STEPS)


def _measured(plan: DecodePlan, header: TraceHeader) -> slice:
    """The recorded steps behind the measured ones: those after the warm-up."""
    start = plan.workload.warmup_steps
    return slice(start, min(start + _distinct_steps(plan), header.num_steps))


def _part(whole_layers: int, num_layers: int) -> str:
    """Layers that keep the whole context, of how many."""
    return str(num_layers) if whole_layers == num_layers else f"{whole_layers} of {num_layers}"


def _same_heads(plan: DecodePlan, header: TraceHeader) -> bool:
    """Whether the trace has each layer that keeps the context, with as many heads as all GPUs that share the model."""
    model, heads = plan.model, plan.kv_heads_of_all
    ours = (model.num_layers, heads, plan.query_heads_of_all // heads)
    recorded = (header.layers_of_model, header.num_kv_heads, header.group_size)
    return ours == recorded and set(model.whole_layers) <= set(header.places)


def _draw_heads(plan: DecodePlan, header: TraceHeader) -> NDArray[np.intp]:
    """The recorded head behind each offloaded layer, KV head and sequence: `[sparse_layers, kv_heads, batch]`.

    Of a model's own trace a GPU that shares the model has the first heads, as many as its part has. Layers that share a
    choice share the head.
    """
    model, batch = plan.model, plan.sequences
    layers = np.array(plan.sparse_layers, dtype=np.intp)
    heads = np.arange(model.num_kv_heads)
    shape = (len(layers), len(heads), batch)
    if _same_heads(plan, header):
        own = np.searchsorted(header.places, layers)[:, None] * header.num_kv_heads + heads
        return _as_chosen(plan, np.broadcast_to(own[..., None], shape).astype(np.intp))
    rng = np.random.default_rng(plan.workload.seed)
    depth = np.rint(layers * (header.num_layers - 1) / max(1, model.num_layers - 1)).astype(np.intp)
    last, dense = header.num_layers - 1, _dense_with_context(plan)
    # nothing predicts the first layers: only recorded heads of which that is true can stand for theirs
    of_none, recorded = layers < _unpredicted_layers(plan), header.first_predicted(_unpredicted_layers(plan))
    if of_none.any() and recorded <= dense:
        raise TraceError(
            f"trace of {header.model}: every recorded layer is predicted from one before it, none can stand for layer "
            f"{layers[0]} of {model.name}, which is not: raise design.dense_layers to {_unpredicted_layers(plan)}"
        )
    lowest = np.where(of_none, dense, max(dense, recorded))
    highest = np.where(of_none, recorded - 1, last)
    low = np.minimum(np.clip(depth - DEPTH_RADIUS, lowest, highest), last)
    high = np.minimum(np.clip(depth + DEPTH_RADIUS, lowest, highest), last)
    layer = rng.integers(low[:, None, None], high[:, None, None] + 1, size=shape)
    drawn = np.asarray(layer * header.num_kv_heads + rng.integers(0, header.num_kv_heads, size=shape), dtype=np.intp)
    return _as_chosen(plan, drawn)


def _as_chosen(plan: DecodePlan, drawn: NDArray[np.intp]) -> NDArray[np.intp]:
    for place, layer in enumerate(plan.sparse_layers):
        if plan.shares_choice(layer):
            drawn[place] = drawn[place - 1]
    return drawn


def _dense_with_context(plan: DecodePlan) -> int:
    """Layers that the design leaves dense, but for those that would not be offloaded anyway: windowed, linear.

    As many recorded ones, from the first, stand for no offloaded layer.
    """
    model = plan.model
    return sum(
        layer not in model.windowed_layers and model.linear_in(layer) is None for layer in range(plan.dense_layers)
    )


def _unpredicted_layers(plan: DecodePlan) -> int:
    """First layers that no layer before them can predict."""
    return plan.design.prefetch_depth if plan.design.prefetches_layers else 0


def _offloaded(
    plan: DecodePlan, header: TraceHeader, drawn: NDArray[np.intp], history: HeadHistory
) -> NDArray[np.bool_]:
    """Which KV heads of each layer are fetched, `[sparse_layers, kv_heads]`: all but those that would move the most."""
    moved = (history.spec_pages + history.demand_pages)[_measured(plan, header)].mean(axis=0)
    order = np.argsort(-moved[drawn].sum(axis=2), axis=1, kind="stable")
    kept = np.ones(drawn.shape[:2], dtype=np.bool_)
    np.put_along_axis(kept, order[:, : plan.pinned_heads_per_layer], False, axis=1)
    return kept


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sums recorded heads into layers of the batch. Sequences after the first see the measured steps rotated."""

    plan: DecodePlan
    measured: slice
    draws: tuple[NDArray[np.float64], ...]
    offsets: tuple[int, ...]

    def total(self, values: NDArray[np.generic]) -> Counts:
        """`[recorded_steps, recorded_heads]` -> `[steps, layers]`, zero where nothing is selected."""
        return self._sum(self._by_sequence(values))

    def sequences(self, values: NDArray[np.bool_]) -> Counts | None:
        """Sequences in which `values` are true of some head, likewise; none unless a model's own indexer chooses."""
        if not self.plan.design.asks_indexer:
            return None
        return self._sum(np.minimum(1.0, each) for each in self._by_sequence(values))

    def _by_sequence(self, values: NDArray[np.generic]) -> Iterator[Counts]:
        """`[steps, sparse_layers]` of one sequence after the other."""
        measured = np.asarray(values[self.measured], dtype=np.float64)
        steps = np.arange(len(measured))
        for draw, offset in zip(self.draws, self.offsets, strict=True):
            yield measured[(steps + offset) % len(steps)] @ draw

    def _sum(self, sequences: Iterable[Counts]) -> Counts:
        result = np.zeros((self.measured.stop - self.measured.start, self.plan.model.num_layers))
        for each in sequences:
            result[:, list(self.plan.sparse_layers)] += each
        return result


def _batch(plan: DecodePlan, header: TraceHeader, history: HeadHistory) -> _Batch:
    drawn = _draw_heads(plan, header)
    kept = _offloaded(plan, header, drawn, history)
    measured = _measured(plan, header)
    recorded = header.num_layers * header.num_kv_heads
    draws = []
    for sequence in range(plan.sequences):
        draw = np.zeros((recorded, drawn.shape[0]))
        np.add.at(draw, (drawn[:, :, sequence], np.arange(drawn.shape[0])[:, None]), kept.astype(np.float64))
        draws.append(draw)
    rng = np.random.default_rng([plan.workload.seed, 1])
    span = measured.stop - measured.start
    offsets = (0, *(int(offset) for offset in rng.integers(0, span, size=plan.sequences - 1)))
    return _Batch(plan, measured, tuple(draws), offsets)


def _stand_in(plan: DecodePlan, trace: AttentionTrace, policy: Policy, history: HeadHistory) -> Traffic:
    batch = _batch(plan, trace.header, history)
    scale = plan.budget_pages / policy.budget_pages
    heads = float(plan.offloaded_heads * len(plan.sparse_layers))
    spec_heads = batch.total(history.spec_missed)
    steps = len(spec_heads)
    overlap = float(batch.total(history.overlap).sum()) / (heads * steps) if heads else 1.0
    return Traffic(
        spec_heads=spec_heads,
        spec_pages=scale * batch.total(history.spec_pages),
        demand_heads=batch.total(history.demand_missed),
        demand_pages=scale * batch.total(history.demand_pages),
        write_back_pages=_write_back(plan, steps),
        requested_pages=_requested(plan, plan.budget_pages, steps),
        reused_heads=batch.total(~history.demand_missed),
        heads=heads,
        overlap=overlap,
        spec_sequences=batch.sequences(history.spec_missed),
        demand_sequences=batch.sequences(history.demand_missed),
        assumptions=assumptions(plan, trace.header),
    )


def _requested(plan: DecodePlan, pages: float, steps: int) -> Counts:
    requested = np.zeros((steps, plan.model.num_layers))
    requested[:, list(plan.sparse_layers)] = plan.offloaded_heads * pages
    return requested


def _write_back(plan: DecodePlan, steps: int) -> Counts:
    """A page per offloaded head leaves a sequence's window every `page_size` steps; sequences take turns."""
    page_size, batch = plan.design.page_size, plan.sequences
    turn = (np.arange(steps)[:, None] + np.arange(batch)[None, :]) % page_size == 0
    return np.asarray(_requested(plan, 1.0, steps) / batch * turn.sum(axis=1)[:, None])


def _nothing_moves(plan: DecodePlan) -> Traffic:
    """Everything is on the device; where attention is sparse, every head still selects in every step."""
    steps = _distinct_steps(plan)
    none = np.zeros((steps, plan.model.num_layers))
    return Traffic(
        spec_heads=none,
        spec_pages=none,
        demand_heads=_requested(plan, 1.0, steps),
        demand_pages=none,
        write_back_pages=none,
        requested_pages=_requested(plan, plan.budget_pages, steps),
        reused_heads=none,
        heads=float(plan.offloaded_heads * len(plan.sparse_layers)),
        overlap=1.0,
        spec_sequences=none if plan.design.asks_indexer else None,
        demand_sequences=_requested(plan, 1.0 / plan.model.num_kv_heads, steps) if plan.design.asks_indexer else None,
    )


def _everything_moves(plan: DecodePlan) -> Traffic:
    steps = _distinct_steps(plan)
    none = np.zeros((steps, plan.model.num_layers))
    # runs of tokens are copied, not whole pages: the last page may be part of one
    all_pages = _requested(plan, plan.workload.context_tokens / plan.design.page_size, steps)
    prefetched = np.zeros_like(all_pages)
    if plan.design.prefetches:
        prefetched = all_pages
    return Traffic(
        spec_heads=none,
        spec_pages=prefetched,
        demand_heads=none,
        demand_pages=all_pages - prefetched,
        write_back_pages=_write_back(plan, steps),
        requested_pages=all_pages,
        reused_heads=none,
        heads=float(plan.offloaded_heads * len(plan.sparse_layers)),
        overlap=1.0,
    )


def assumptions(plan: DecodePlan, header: TraceHeader) -> tuple[str, ...]:
    """What a report must say about the trace behind its numbers."""
    notes = []
    if not _same_heads(plan, header):
        stand_in = f"recorded KV heads of {header.model} stand for those of {plan.model.name}"
        notes.append(f"{stand_in}, at equal relative depth")
        if plan.model.latent is not None:
            notes.append(
                f"choices of {header.group_size} query heads stand for those that all heads make together: how often "
                "latent attention can use such a choice again is not known"
            )
    elif plan.kv_heads_of_all > plan.model.num_kv_heads:
        notes.append(
            f"the first {plan.model.num_kv_heads} of {plan.kv_heads_of_all} recorded KV heads stand for all GPUs"
        )
    if plan.workload.context_tokens != header.context_tokens:
        notes.append(
            f"page choices recorded at {header.context_tokens} tokens are scaled to {plan.workload.context_tokens}: "
            "equal shares of the context are assumed to overlap equally"
        )
    share, recorded = plan.budget_pages / plan.num_pages, header.context_tokens // header.page_size
    if round(share * recorded) > header.max_budget_pages:
        notes.append(
            f"the best {header.max_budget_pages} of {recorded} recorded pages stand for all that an indexer chooses, "
            f"{share:.0%} of the context: sets that change less are not known"
        )
    distinct = _measured(plan, header)
    if distinct.stop - distinct.start < plan.workload.steps:
        notes.append(f"{distinct.stop - distinct.start} steps are told apart, the others repeat them")
    if plan.sequences > 1:
        notes.append("sequences of the batch are draws from one recorded text, at different steps")
    if plan.design.selector.value not in header.selectors:
        notes.append(f"page choices of the selector {header.selectors[0]} stand for those of {plan.design.selector}")
    if plan.design.page_size != header.page_size:
        notes.append(f"choices among pages of {header.page_size} tokens stand for pages of {plan.design.page_size}")
    return tuple(notes)
