"""Replays a cache policy over an attention trace: who hits, who misses, which pages move. Knows nothing about time.

All recorded KV heads are replayed at once, in units of the recorded pages; `clo_sim.stand_in` turns the result into the
traffic of a model, a batch and a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError, TraceError
from clo.plan import DecodePlan
from clo.similarity import Fold, Vectors, stepwise
from clo.specs import Cache, Design, GqaFold, OnMiss
from clo.thresholds import tau_by_importance, tau_for_hit_rate
from clo.trace import NO_PAGE, AttentionTrace

ABSENT = -(2**62)
"""Stamp of a page that is not on the device: older than any other."""

REAL, PREDICTED = 0, 1
"""Where a query comes from: the layer's own input, or the input of an earlier layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What of a design decides residency, in recorded pages. Hashable: designs that agree on it share a replay."""

    selector: str
    cache: Cache
    on_miss: OnMiss
    tau: float
    target_hit_rate: float | None
    tau_importance_power: float
    gqa_fold: GqaFold
    budget_pages: int
    slot_pages: int
    lookahead: int
    speculates_last_step: bool

    @property
    def gated(self) -> bool:
        """Whether a cosine decides that a head keeps its set."""
        return self.cache is Cache.HEAD_REUSE or self.speculates_last_step


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadHistory:
    """What each recorded KV head did in each step, `[steps, heads]`; pages are recorded pages."""

    spec_missed: NDArray[np.bool_]
    spec_pages: NDArray[np.int32]
    demand_missed: NDArray[np.bool_]
    demand_pages: NDArray[np.int32]
    overlap: NDArray[np.float32]


def policy_of(plan: DecodePlan, trace: AttentionTrace) -> Policy:
    """Scale a plan's page counts to the recorded context: the same shares of the context are kept and attended.

    Raises `TraceError` when the trace does not hold what the design asks for, `SpecError` for a context of one page.
    """
    header, design = trace.header, plan.design
    recorded = header.context_tokens // header.page_size
    if plan.num_pages == 1:
        raise SpecError(
            f"workload.context_tokens = {plan.workload.context_tokens}: fits one page (design.page_size = "
            f"{design.page_size}), of which there is nothing to select: take more tokens, or a design that keeps all "
            "on the GPU (cache = resident)"
        )
    budget = max(1, round(plan.budget_pages / plan.num_pages * recorded))
    slots = max(budget, round(plan.slot_pages / plan.budget_pages * budget))
    if budget > header.max_budget_pages and not design.asks_indexer:
        share = f"{plan.budget_pages / plan.num_pages:.3g}"
        pages = design.budget_pages
        asked = f"budget_fraction = {share}" if pages is None else f"budget_pages = {pages}, {share} of the context"
        raise TraceError(
            f"design.{asked}: the trace records only the best {header.max_budget_pages} of {recorded} pages: lower the "
            "budget, or record with --max-budget-pages"
        )
    lookahead = design.prefetch_depth if design.prefetches_layers else 0
    if lookahead and lookahead not in header.lookaheads:
        known = list(header.lookaheads)
        raise TraceError(f"design.prefetch_depth = {lookahead}: the trace recorded lookaheads {known}")
    return Policy(
        selector=_recorded_selector(design, trace),
        cache=design.cache,
        on_miss=design.on_miss,
        tau=design.tau,
        target_hit_rate=design.target_hit_rate,
        tau_importance_power=design.tau_importance_power,
        gqa_fold=design.gqa_fold,
        # how much of a short context a model chooses by itself is not a design's to lower: the best stand for all
        budget_pages=min(budget, header.max_budget_pages),
        slot_pages=slots,
        lookahead=lookahead,
        speculates_last_step=design.speculates_last_step,
    )


def _recorded_selector(design: Design, trace: AttentionTrace) -> str:
    """The design's selector where it was recorded, else the first recorded one (`stand_in.assumptions` says so)."""
    known = trace.header.selectors
    return design.selector.value if design.selector.value in known else known[0]


def replay(trace: AttentionTrace, policy: Policy) -> HeadHistory:
    """Run `policy` over every recorded step of every head; prefill has left the latest pages in the slots."""
    return _Replay(trace, policy).run()


class _Replay:
    """The caches of all recorded heads while a trace is replayed."""

    def __init__(self, trace: AttentionTrace, policy: Policy) -> None:
        header = trace.header
        self.policy = policy
        self.num_steps = header.num_steps
        self.num_heads = header.num_layers * header.num_kv_heads
        self.first_predicted = header.first_predicted(policy.lookahead) * header.num_kv_heads
        self.real = _head_pages(trace.pages[policy.selector], policy.budget_pages)
        self.predicted = (
            _head_pages(trace.lookahead_pages[(policy.selector, policy.lookahead)], policy.budget_pages)
            if policy.lookahead
            else self.real
        )
        # one column more than there are pages: padding lands there and is never counted
        newest = header.num_candidate_pages(0)
        self.padding = 1 + max(_highest(self.real), _highest(self.predicted), newest)
        self.stamp = np.full((self.num_heads, self.padding + 1), ABSENT, dtype=np.int64)
        if policy.cache is not Cache.NONE:
            self.stamp[:] = _after_prefill(trace, policy.slot_pages, self.padding + 1)
        self.held = np.full((self.num_heads, policy.budget_pages), self.padding, dtype=np.int64)
        self.gate = _Gate(trace, policy) if policy.gated else None
        self.clock = 0

    def run(self) -> HeadHistory:
        shape = (self.num_steps, self.num_heads)
        missed = [np.zeros(shape, dtype=np.bool_) for _ in range(2)]
        pages = [np.zeros(shape, dtype=np.int32) for _ in range(2)]
        overlap = np.ones(shape, dtype=np.float32)
        for step in range(self.num_steps):
            if self.policy.lookahead:
                self._phase(step, PREDICTED, self._predicting_heads(step), missed[0][step], pages[0][step])
            self._phase(step, REAL, self._deciding_heads(step), missed[1][step], pages[1][step])
            overlap[step] = self._overlap(step)
            if self.policy.speculates_last_step:
                rest = np.flatnonzero(~missed[1][step])
                self._phase(step, REAL, rest, missed[0][step], pages[0][step])
        return HeadHistory(
            spec_missed=missed[0],
            spec_pages=pages[0],
            demand_missed=missed[1],
            demand_pages=pages[1],
            overlap=overlap,
        )

    def _predicting_heads(self, step: int) -> NDArray[np.intp]:
        heads = np.arange(self.first_predicted, self.num_heads)
        return self.gate.drifted(step, PREDICTED, heads) if self.gate is not None else heads

    def _deciding_heads(self, step: int) -> NDArray[np.intp]:
        """Heads whose real query selects: all, those that drifted, or those that nothing was predicted for."""
        heads = np.arange(self.num_heads)
        if self.gate is not None:
            return self.gate.drifted(step, REAL, heads)
        if self.policy.cache is Cache.NONE and self.policy.lookahead:
            return heads[: self.first_predicted]
        return heads

    def _phase(
        self, step: int, origin: int, heads: NDArray[np.intp], missed: NDArray[np.bool_], pages: NDArray[np.int32]
    ) -> None:
        """Heads select by the query of `origin`; what is not resident is fetched, then the oldest pages leave."""
        if not heads.size:
            return
        chosen = (self.real if origin == REAL else self.predicted)[step, heads]
        chosen = np.where(chosen == NO_PAGE, self.padding, chosen)
        missed[heads] = True
        pages[heads] += self._count_fetched(heads, chosen)
        self._keep(heads, chosen)
        self.held[heads] = chosen
        if self.gate is not None:
            self.gate.move(step, origin, heads)

    def _count_fetched(self, heads: NDArray[np.intp], chosen: NDArray[np.int64]) -> NDArray[np.int32]:
        wanted = chosen != self.padding
        if self.policy.cache is not Cache.NONE and self.policy.on_miss is OnMiss.DIFF:
            wanted &= self.stamp[heads[:, None], chosen] == ABSENT
        return np.asarray(wanted.sum(axis=1), dtype=np.int32)

    def _keep(self, heads: NDArray[np.intp], chosen: NDArray[np.int64]) -> None:
        """Stamp the chosen pages as just used, best last to leave, and drop what exceeds the slots."""
        budget = self.policy.budget_pages
        self.clock += budget
        self.stamp[heads[:, None], chosen] = self.clock - np.arange(budget)
        self.stamp[:, self.padding] = ABSENT
        stamps = self.stamp[heads]
        if stamps.shape[1] > self.policy.slot_pages:
            cut = stamps.shape[1] - self.policy.slot_pages
            oldest_kept = np.partition(stamps, cut, axis=1)[:, cut]
            self.stamp[heads] = np.where(stamps >= oldest_kept[:, None], stamps, ABSENT)

    def _overlap(self, step: int) -> NDArray[np.float32]:
        """Share of the real query's selection that the head attends in this step."""
        mark = np.zeros((self.num_heads, self.padding + 1), dtype=np.bool_)
        np.put_along_axis(mark, self.held, True, axis=1)
        wanted = self.real[step]
        real = wanted != NO_PAGE
        found = np.take_along_axis(mark, np.where(real, wanted, self.padding).astype(np.int64), axis=1) & real
        return np.asarray(found.sum(axis=1) / np.maximum(1, real.sum(axis=1)), dtype=np.float32)


def _after_prefill(trace: AttentionTrace, slot_pages: int, num_stamps: int) -> NDArray[np.int64]:
    """Stamps when decoding begins, `[pages]`: the last pages computed are still in the slots, the newest used last."""
    pages = np.arange(num_stamps)
    newest = trace.header.num_candidate_pages(0)
    resident = (pages > newest - slot_pages) & (pages >= 1) & (pages <= newest)
    return np.where(resident, pages - num_stamps, ABSENT)


def _head_pages(pages: NDArray[np.uint16], budget: int) -> NDArray[np.int64]:
    """`[steps, layers, kv_heads, max_budget]` -> `[steps, heads, budget]`."""
    steps = pages.shape[0]
    return pages[..., :budget].reshape(steps, -1, budget).astype(np.int64)


def _highest(pages: NDArray[np.int64]) -> int:
    return int(np.where(pages == NO_PAGE, 0, pages).max(initial=0))


def _thresholds(trace: AttentionTrace, policy: Policy, queries: Vectors, fold: Fold) -> NDArray[np.float32]:
    """Tau per recorded KV head: that which reaches the target hit rate, or grows with importance, or is the same."""
    if policy.target_hit_rate is not None:
        return tau_for_hit_rate(queries, fold, policy.target_hit_rate)
    kv_heads = trace.header.num_kv_heads
    by_head = tau_by_importance(policy.tau, policy.tau_importance_power, trace.head_importance, kv_heads)
    return by_head.ravel().astype(np.float32)


class _Gate:
    """Anchors of all heads, and who has drifted from its own."""

    def __init__(self, trace: AttentionTrace, policy: Policy) -> None:
        num_kv_heads = trace.header.num_kv_heads
        self._fold = Fold(trace, policy.gqa_fold)
        self._queries = [stepwise(trace.queries, num_kv_heads)]
        if policy.lookahead:
            self._queries.append(stepwise(trace.lookahead_queries[policy.lookahead], num_kv_heads))
        self._tau = _thresholds(trace, policy, self._queries[REAL], self._fold)
        self._anchors = np.zeros_like(self._queries[REAL][0])
        self._anchored = np.zeros(len(self._anchors), dtype=np.bool_)

    def drifted(self, step: int, origin: int, heads: NDArray[np.intp]) -> NDArray[np.intp]:
        """Those of `heads` whose query is not within tau of its anchor, or that have none yet."""
        cosine = self._fold.cosine(self._queries[origin][step, heads], self._anchors[heads], heads)
        return heads[~self._anchored[heads] | (cosine < self._tau[heads])]

    def move(self, step: int, origin: int, heads: NDArray[np.intp]) -> None:
        """The query of `step` becomes the anchor."""
        self._anchors[heads] = self._queries[origin][step, heads]
        self._anchored[heads] = True


def fewest_pages(trace: AttentionTrace, policy: Policy, measured: slice = slice(None)) -> NDArray[np.int32]:
    """Fewest pages, `[steps, heads]`, that any cache of `slot_pages` can fetch for the exact selections of `measured`.

    Belady's rule (evict what is needed furthest in the future) with all those steps known in advance and the best
    pages in the slots before them; no design that attends to the real query's selection moves less in total.
    """
    pages = _head_pages(trace.pages[policy.selector][measured], policy.budget_pages)
    steps, heads, _ = pages.shape
    padding = 1 + _highest(pages)
    wanted = np.zeros((steps, heads, padding + 1), dtype=np.bool_)
    np.put_along_axis(wanted, np.where(pages == NO_PAGE, padding, pages), True, axis=2)
    wanted[..., padding] = False
    next_use = _next_use(wanted)
    first_use = np.where(wanted[0], 0, next_use[0])
    nothing = np.zeros_like(wanted[0])
    resident = _keep_soonest(np.ones_like(nothing), nothing, first_use, policy.slot_pages)
    fetched = np.zeros((steps, heads), dtype=np.int32)
    for step in range(steps):
        fetched[step] = (wanted[step] & ~resident).sum(axis=1)
        resident |= wanted[step]
        resident = _keep_soonest(resident, wanted[step], next_use[step], policy.slot_pages)
    return fetched


def _next_use(wanted: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Step of the next use strictly after each step, `[steps, heads, pages]`; `steps` when there is none."""
    steps = wanted.shape[0]
    result = np.full(wanted.shape, steps, dtype=np.int32)
    for step in range(steps - 2, -1, -1):
        result[step] = np.where(wanted[step + 1], step + 1, result[step + 1])
    return result


def _keep_soonest(
    resident: NDArray[np.bool_], wanted: NDArray[np.bool_], next_use: NDArray[np.int32], slots: int
) -> NDArray[np.bool_]:
    if resident.shape[1] <= slots:
        return resident
    # what this step attends stays first; page number breaks ties so that exactly `slots` remain
    priority = np.where(wanted, -1, next_use).astype(np.int64) * resident.shape[1] + np.arange(resident.shape[1])
    priority = np.where(resident, priority, np.iinfo(np.int64).max)
    last_kept = np.partition(priority, slots - 1, axis=1)[:, slots - 1]
    return resident & (priority <= last_kept[:, None])
