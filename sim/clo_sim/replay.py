"""Replays a cache policy over an attention trace: who hits, who misses, which pages must move. Knows nothing about time.

All recorded KV heads are replayed at once, in units of the recorded pages; `clo_sim.stand_in` turns the result into the
traffic of a model, a batch and a context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from clo.errors import TraceError
from clo.plan import DecodePlan
from clo.specs import Cache, Design, GqaFold, OnMiss
from clo.trace import AttentionTrace
from clo_sim.similarity import PREDICTED, REAL, Similarity, similarity

ABSENT = -(2**62)
"""Stamp of a page that is not on the device: older than any other."""

NO_ANCHOR = -1
"""Anchor step of a head that has not selected yet."""

NO_PAGE = 0xFFFF
"""Padding of a page list that has fewer candidates than the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What of a design decides residency, in recorded pages. Hashable: replays are shared by designs that agree on it."""

    selector: str
    cache: Cache
    on_miss: OnMiss
    tau: float
    target_hit_rate: float | None
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

    Raises `TraceError` when the trace does not hold what the design asks for.
    """
    header, design = trace.header, plan.design
    recorded = header.context_tokens // header.page_size
    budget = max(1, round(plan.budget_pages / plan.num_pages * recorded))
    if budget > header.max_budget_pages:
        raise TraceError(
            f"design.budget_fraction = {plan.budget_pages / plan.num_pages:.3g}: the trace records only the best "
            f"{header.max_budget_pages} of {recorded} pages: lower the budget, or record with --max-budget-pages"
        )
    lookahead = design.prefetch_depth if design.prefetches and not design.speculates_last_step else 0
    if lookahead and lookahead not in header.lookaheads:
        raise TraceError(f"design.prefetch_depth = {lookahead}: the trace recorded lookaheads {list(header.lookaheads)}")
    return Policy(
        selector=_recorded_selector(design, trace),
        cache=design.cache,
        on_miss=design.on_miss,
        tau=design.tau,
        target_hit_rate=design.target_hit_rate,
        gqa_fold=design.gqa_fold,
        budget_pages=budget,
        slot_pages=max(budget, round(plan.slot_pages / plan.budget_pages * budget)),
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
        self.first_predicted = policy.lookahead * header.num_kv_heads
        self.real = _head_pages(trace.pages[policy.selector], policy.budget_pages)
        self.predicted = (
            _head_pages(trace.lookahead_pages[(policy.selector, policy.lookahead)], policy.budget_pages)
            if policy.lookahead
            else self.real
        )
        # one column more than there are pages: padding lands there and is never counted
        self.padding = 1 + max(_highest(self.real), _highest(self.predicted))
        self.stamp = np.full((self.num_heads, self.padding + 1), ABSENT, dtype=np.int64)
        if policy.cache is not Cache.NONE:
            self.stamp[:] = _after_prefill(trace, policy.slot_pages, self.padding + 1)
        self.held = np.full((self.num_heads, policy.budget_pages), self.padding, dtype=np.int64)
        self.anchor_origin = np.zeros(self.num_heads, dtype=np.int8)
        self.anchor_step = np.full(self.num_heads, NO_ANCHOR, dtype=np.int32)
        self.similarity = similarity_of(trace, policy.gqa_fold, policy.lookahead) if policy.gated else None
        self.tau = _thresholds(trace, policy)
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
                self.anchor_origin[:], self.anchor_step[:] = REAL, step
        return HeadHistory(
            spec_missed=missed[0],
            spec_pages=pages[0],
            demand_missed=missed[1],
            demand_pages=pages[1],
            overlap=overlap,
        )

    def _predicting_heads(self, step: int) -> NDArray[np.intp]:
        heads = np.arange(self.first_predicted, self.num_heads)
        return self._drifted(step, PREDICTED, heads) if self.policy.cache is Cache.HEAD_REUSE else heads

    def _deciding_heads(self, step: int) -> NDArray[np.intp]:
        """Heads whose real query selects: all, those that drifted, or those that nothing was predicted for."""
        heads = np.arange(self.num_heads)
        if self.policy.gated:
            return self._drifted(step, REAL, heads)
        if self.policy.cache is Cache.NONE and self.policy.lookahead:
            return heads[: self.first_predicted]
        return heads

    def _drifted(self, step: int, origin: int, heads: NDArray[np.intp]) -> NDArray[np.intp]:
        assert self.similarity is not None
        cosine = self.similarity.between(origin, step, heads, self.anchor_origin, self.anchor_step)
        return heads[(self.anchor_step[heads] == NO_ANCHOR) | (cosine < self.tau[heads])]

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
        self.anchor_origin[heads], self.anchor_step[heads] = origin, step

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


@lru_cache(maxsize=8)
def _cached_similarity(key: _TraceKey, fold: GqaFold, lookahead: int) -> Similarity:
    return similarity(key.trace, fold, lookahead)


@dataclass(frozen=True, slots=True, eq=False)
class _TraceKey:
    trace: AttentionTrace

    def __hash__(self) -> int:
        return id(self.trace)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TraceKey) and other.trace is self.trace


def similarity_of(trace: AttentionTrace, fold: GqaFold, lookahead: int) -> Similarity:
    """`similarity`, remembered for the traces in use: it costs more than a replay."""
    return _cached_similarity(_TraceKey(trace), fold, lookahead)


def _thresholds(trace: AttentionTrace, policy: Policy) -> NDArray[np.float32]:
    """Tau per recorded KV head: the fixed one, or the one that reaches the target hit rate."""
    heads = trace.header.num_layers * trace.header.num_kv_heads
    if policy.target_hit_rate is None or not policy.gated:
        return np.full(heads, policy.tau, dtype=np.float32)
    cosine = similarity_of(trace, policy.gqa_fold, policy.lookahead).cosine[REAL][REAL]
    return tau_for_hit_rate(cosine, policy.target_hit_rate)


def anchored_hit_rate(cosine: NDArray[np.float32], tau: NDArray[np.float32]) -> NDArray[np.float64]:
    """Hit rate per head, `[heads]`, when the anchor moves only on a miss. `cosine` is `[heads, steps, steps]`."""
    heads = np.arange(cosine.shape[0])
    anchor = np.zeros(cosine.shape[0], dtype=np.intp)
    hits = np.zeros(cosine.shape[0])
    for step in range(1, cosine.shape[1]):
        hit = cosine[heads, step, anchor] >= tau
        hits += hit
        anchor = np.where(hit, anchor, step)
    return hits / (cosine.shape[1] - 1)


def tau_for_hit_rate(cosine: NDArray[np.float32], target: float) -> NDArray[np.float32]:
    """The largest tau per head (to 1/4096) whose anchored hit rate reaches `target`, by bisection."""
    low = np.full(cosine.shape[0], -1.0, dtype=np.float32)
    high = np.full(cosine.shape[0], 1.0, dtype=np.float32)
    for _ in range(13):
        middle = (low + high) / 2
        reached = anchored_hit_rate(cosine, middle) >= target
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return low


def fewest_pages(trace: AttentionTrace, policy: Policy) -> NDArray[np.int32]:
    """Fewest pages, `[steps, heads]`, that any cache of `slot_pages` can fetch for the exact selection of every step.

    Belady's rule (evict what is needed furthest in the future) with the whole trace known in advance and the best
    pages in the slots when decoding begins; no design that attends to the real query's selection moves less in total.
    """
    pages = _head_pages(trace.pages[policy.selector], policy.budget_pages)
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
