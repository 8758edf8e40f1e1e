"""A synthetic attention workload fitted to a trace, for contexts and steps beyond it. Knows nothing about time.

Every head keeps what its recording shows on average: how the cosine of its queries and the overlap of its page sets
fall with distance, and how well a predicted query agrees with the real one. The model, per head:

- query: a fixed direction, plus a part that drifts as a first-order autoregression, plus fresh noise, with the shares
  `(1, b, c)` such that `cosine(d) = (1 - b - c) + b * rho**d` for distance d >= 1;
- page scores: the same three parts, Gaussian over pages, with the correlation at each distance that gives the recorded
  overlap of the best pages;
- drift has a common random clock per head (gamma increments of mean 1), so that steps in which the query jumps are
  steps in which the page set changes. Its variance is that of the recorded adjacent cosines' distance from 1.

What it does not keep: which pages are close in the text, and differences between texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError
from clo.similarity import unit_queries
from clo.trace import NO_PAGE, AttentionTrace, TraceHeader
from clo.trace_stats import overlap

LAGS = (1, 2, 4, 8, 16, 32, 64)
"""Distances in steps at which a trace is measured."""

Floats = NDArray[np.float64]
Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """`value(d) = (1 - drifting - fresh) + drifting * rho**d` for d >= 1, per head `[heads]`."""

    drifting: Floats
    fresh: Floats
    rho: Floats

    def value(self, distance: float) -> Floats:
        """The fitted law, `[heads]`."""
        return 1 - self.drifting - self.fresh + self.drifting * self.rho**distance


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SyntheticWorkload:
    """What was fitted: per query head the query's drift, per KV head the scores' drift by selector."""

    header: TraceHeader
    queries: Drift
    scores: dict[str, Drift]
    lookahead_cosine: dict[int, Floats]
    lookahead_correlation: dict[tuple[str, int], Floats]
    clock_shape: Floats
    head_importance: NDArray[np.float32]

    def generate(
        self,
        *,
        num_steps: int,
        context_tokens: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> AttentionTrace:
        """A trace of any length. Same seed, same trace, bit for bit. Raises `SpecError` for an unusable size.

        `progress(done, total)` is called as steps of each selector are drawn.
        """
        header = _header(self.header, num_steps, context_tokens or self.header.context_tokens)
        rng = np.random.default_rng([seed, num_steps, header.context_tokens])
        clock = self._clock(rng, num_steps)
        group = header.num_query_heads // header.num_kv_heads
        real = _queries(rng, self.queries, np.repeat(clock, group, axis=1), np.repeat(self.clock_shape, group), header)
        ahead = {d: _blend_queries(rng, real, self.lookahead_cosine[d]) for d in header.lookaheads}
        pages, ahead_pages = self._pages(rng, header, clock, progress or (lambda *_: None))
        shape = (num_steps, header.num_layers, header.num_kv_heads)
        return AttentionTrace.from_arrays(
            header,
            queries=real.reshape(header.query_shape),
            lookahead_queries={d: queries.reshape(header.query_shape) for d, queries in ahead.items()},
            pages=pages,
            lookahead_pages=ahead_pages,
            resident_mass=np.zeros(shape, dtype=np.float16),
            head_importance=self.head_importance,
        )

    def _clock(self, rng: np.random.Generator, num_steps: int) -> Floats:
        """Increments of each KV head's clock, `[steps, heads]`, mean 1."""
        increments = rng.gamma(self.clock_shape, 1 / self.clock_shape, size=(num_steps, len(self.clock_shape)))
        return np.asarray(increments)

    def _pages(
        self, rng: np.random.Generator, header: TraceHeader, clock: Floats, progress: Callable[[int, int], None]
    ) -> tuple[dict[str, NDArray[np.uint16]], dict[tuple[str, int], NDArray[np.uint16]]]:
        pages: dict[str, NDArray[np.uint16]] = {}
        ahead: dict[tuple[str, int], NDArray[np.uint16]] = {}
        for number, selector in enumerate(header.selectors):
            drawn: list[NDArray[np.uint16]] = []
            predicted: dict[int, list[NDArray[np.uint16]]] = {d: [] for d in header.lookaheads}
            drift, shape = self.scores[selector], self.clock_shape
            for step, scores in enumerate(_scores(rng, drift, clock, header.universe, shape)):
                count = header.num_candidate_pages(step)
                drawn.append(_best(scores[:, :count], header))
                for d in header.lookaheads:
                    noisy = _blend(rng, scores[:, :count], self.lookahead_correlation[(selector, d)])
                    predicted[d].append(_best(noisy, header))
                progress(number * len(clock) + step + 1, len(header.selectors) * len(clock))
            pages[selector] = np.stack(drawn).reshape(header.page_shape)
            for d in header.lookaheads:
                ahead[(selector, d)] = np.stack(predicted[d]).reshape(header.page_shape)
        return pages, ahead


def fit_synthetic(trace: AttentionTrace, *, budget_fraction: float = 0.1) -> SyntheticWorkload:
    """Measure a trace at several distances and fit every head. Overlaps are matched at `budget_fraction`."""
    header = trace.header
    lags = [lag for lag in LAGS if lag < header.num_steps - 1]
    if not lags:
        raise SpecError(f"trace of {header.num_steps} steps: a synthetic workload needs at least 3")
    share = _share(header, budget_fraction)
    unit = unit_queries(trace.queries)
    return SyntheticWorkload(
        header=header,
        queries=fit_drift(lags, np.stack([_cosine_at(unit, lag) for lag in lags])),
        scores={name: fit_drift(lags, _correlations(trace, name, lags, share)) for name in header.selectors},
        lookahead_cosine={d: _lookahead_cosine(trace, unit, d) for d in header.lookaheads},
        lookahead_correlation={
            (name, d): correlation_of_overlap(_lookahead_overlap(trace, name, d, share), share[1])
            for name in header.selectors
            for d in header.lookaheads
        },
        clock_shape=_clock_shape(unit, header),
        head_importance=np.asarray(trace.head_importance),
    )


def fit_drift(lags: list[int], values: Floats) -> Drift:
    """Least squares of `Drift.value` over a grid of `rho`, per head. `values` is `[lags, heads]`."""
    distance = np.asarray(lags, dtype=np.float64)
    best: tuple[Floats, Floats, Floats, Floats] | None = None
    for rho in (0.3, 0.5, 0.7, 0.8, 0.87, 0.92, 0.95, 0.97, 0.985):
        basis = np.stack([np.ones_like(distance), rho**distance], axis=1)
        (level, drifting), *_ = np.linalg.lstsq(basis, values, rcond=None)
        level, drifting = np.clip(level, 0.0, 1.0), np.clip(drifting, 0.0, 1.0)
        drifting = np.minimum(drifting, 1.0 - level)
        error = ((level + drifting * rho ** distance[:, None] - values) ** 2).sum(axis=0)
        if best is None:
            best = (error, level, drifting, np.full_like(level, rho))
        else:
            better = error < best[0]
            found = (error, level, drifting, np.full_like(level, rho))
            best = tuple(np.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore[assignment]
    assert best is not None
    _, level, drifting, rho_of_head = best
    return Drift(drifting=drifting, fresh=np.maximum(0.0, 1.0 - level - drifting), rho=rho_of_head)


@cache
def _overlap_curve(share: float) -> tuple[Floats, Floats]:
    """Correlation of two standard Gaussians -> chance that one is in its top `share` given that the other is."""
    correlations = np.linspace(0.0, 1.0, 101)
    uniform = (np.arange(4096) + 0.5) / 4096
    first, noise = np.meshgrid(_normal_quantile(uniform[::8]), _normal_quantile(uniform[4::8]))
    cut = _normal_quantile(np.array([1.0 - share]))[0]
    top = first > cut
    overlaps = [float((top & (c * first + np.sqrt(1 - c * c) * noise > cut)).sum() / top.sum()) for c in correlations]
    return correlations, np.maximum.accumulate(np.array(overlaps))


def _normal_quantile(probability: Floats) -> Floats:
    """Inverse of the normal distribution function."""
    inverse = NormalDist().inv_cdf
    return np.array([inverse(float(value)) for value in probability])


def correlation_of_overlap(overlaps: Floats, share: float) -> Floats:
    """The correlation of page scores at which the best `share` of them overlaps so much."""
    correlations, curve = _overlap_curve(round(share, 3))
    return np.interp(overlaps, curve, correlations)


def _header(header: TraceHeader, num_steps: int, context_tokens: int) -> TraceHeader:
    scale = context_tokens / header.context_tokens
    return header.with_fields(
        model=f"synthetic after {header.model}" if not header.model.startswith("synthetic") else header.model,
        num_steps=num_steps,
        context_tokens=context_tokens,
        max_budget_pages=max(1, round(header.max_budget_pages * scale)),
        text_source=f"generated, fitted to a trace over {header.text_source}",
    )


def _share(header: TraceHeader, budget_fraction: float) -> tuple[int, float]:
    """Pages of the budget, and their share of the candidates."""
    pages = header.context_tokens // header.page_size
    budget = min(header.max_budget_pages, max(1, round(budget_fraction * pages)))
    return budget, budget / header.num_candidate_pages(0)


def _cosine_at(unit: NDArray[np.float32], lag: int) -> Floats:
    """Mean cosine of queries `lag` steps apart, `[query_heads]`."""
    return np.asarray(np.einsum("hsd,hsd->h", unit[:, lag:], unit[:, :-lag]) / (unit.shape[1] - lag), dtype=np.float64)


def _correlations(trace: AttentionTrace, selector: str, lags: list[int], share: tuple[int, float]) -> Floats:
    pages, num_pages = trace.pages[selector], trace.header.universe + 1
    rows = [overlap(pages[lag:], pages[:-lag], share[0], num_pages).mean(axis=0).reshape(-1) for lag in lags]
    return np.stack([correlation_of_overlap(row.astype(np.float64), share[1]) for row in rows])


def _lookahead_cosine(trace: AttentionTrace, unit: NDArray[np.float32], distance: int) -> Floats:
    ahead = unit_queries(trace.lookahead_queries[distance])
    return np.asarray(np.einsum("hsd,hsd->h", unit, ahead) / unit.shape[1], dtype=np.float64)


def _lookahead_overlap(trace: AttentionTrace, selector: str, distance: int, share: tuple[int, float]) -> Floats:
    ahead = trace.lookahead_pages[(selector, distance)]
    shared = overlap(trace.pages[selector], ahead, share[0], trace.header.universe + 1)
    return np.asarray(shared.mean(axis=0).reshape(-1), dtype=np.float64)


def _clock_shape(unit: NDArray[np.float32], header: TraceHeader) -> Floats:
    """Gamma shape per KV head: 1 / squared coefficient of variation of the adjacent cosines' distance from 1."""
    cosine = np.einsum("hsd,hsd->hs", unit[:, 1:], unit[:, :-1])
    distance = 1 - cosine.reshape(-1, header.num_query_heads // header.num_kv_heads, cosine.shape[1]).mean(axis=1)
    variation = distance.std(axis=1) / np.maximum(distance.mean(axis=1), 1e-9)
    return np.asarray(np.clip(1 / np.maximum(variation, 1e-3) ** 2, 0.5, 50.0), dtype=np.float64)


def _decay(rho: Floats, clock: Floats, shape: Floats) -> Floats:
    """`base**clock`, with the base whose mean over the gamma clock is `rho`.

    From the gamma distribution's transform: E[base**g] = (1 - ln(base) / shape)**-shape.
    """
    log_base = shape * (1 - rho ** (-1 / shape))
    return np.asarray(np.exp(log_base * clock))


def _queries(
    rng: np.random.Generator, drift: Drift, clock: Floats, shape: Floats, header: TraceHeader
) -> NDArray[np.float32]:
    """Queries `[steps, heads, head_dim]`: fixed direction, drifting and fresh parts in the other dimensions."""
    steps, heads = clock.shape
    decay = _decay(drift.rho, clock, shape)
    level = 1 - drift.drifting - drift.fresh
    width = header.head_dim - 1
    state = rng.standard_normal((heads, width))
    queries = np.empty((steps, heads, header.head_dim), dtype=np.float32)
    for step in range(steps):
        keep = decay[step][:, None]
        state = keep * state + np.sqrt(1 - keep**2) * rng.standard_normal((heads, width))
        fresh = rng.standard_normal((heads, width))
        moving = np.sqrt(drift.drifting)[:, None] * state + np.sqrt(drift.fresh)[:, None] * fresh
        queries[step, :, 0] = np.sqrt(np.maximum(0.0, level) * width)
        queries[step, :, 1:] = moving
    return queries


def _blend_queries(rng: np.random.Generator, queries: NDArray[np.float32], cosine: Floats) -> NDArray[np.float32]:
    """Queries whose cosine with the given ones is `cosine` on average."""
    width = queries.shape[-1]
    norm = np.linalg.norm(queries, axis=-1, keepdims=True) / np.sqrt(width)
    noise = rng.standard_normal(queries.shape) * norm
    share = np.clip(cosine, 0.0, 1.0)[:, None]
    return np.asarray(share * queries + np.sqrt(1 - share**2) * noise, dtype=np.float32)


def _blend(rng: np.random.Generator, scores: Scores, correlation: Floats) -> Scores:
    share = np.clip(correlation, 0.0, 1.0).astype(np.float32)[:, None]
    noise = rng.standard_normal(scores.shape, dtype=np.float32)
    return np.asarray(share * scores + np.sqrt(1 - share**2) * noise, dtype=np.float32)


def _scores(rng: np.random.Generator, drift: Drift, clock: Floats, num_pages: int, shape: Floats) -> Iterator[Scores]:
    """Scores of each step, `[heads, pages]`: a page's lasting relevance, a drifting part, fresh noise."""
    decay = _decay(drift.rho, clock, shape)
    size = (clock.shape[1], num_pages)
    lasting, state = (rng.standard_normal(size, dtype=np.float32) for _ in range(2))
    shares = (np.maximum(0.0, 1 - drift.drifting - drift.fresh), drift.drifting, drift.fresh)
    level, drifting, fresh = (np.sqrt(share).astype(np.float32)[:, None] for share in shares)
    for step in range(len(clock)):
        keep = decay[step].astype(np.float32)[:, None]
        state = keep * state + np.sqrt(1 - keep**2) * rng.standard_normal(size, dtype=np.float32)
        yield level * lasting + drifting * state + fresh * rng.standard_normal(size, dtype=np.float32)


def _best(scores: Scores, header: TraceHeader) -> NDArray[np.uint16]:
    """Pages by descending score, `[heads, max_budget]`; pages are numbered from 1."""
    count = min(header.max_budget_pages, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    pages = np.full((len(scores), header.max_budget_pages), NO_PAGE, dtype=np.uint16)
    pages[:, :count] = np.take_along_axis(best, order, axis=1) + 1
    return pages
