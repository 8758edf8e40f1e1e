"""From timed decode steps to the costs of operations: what each takes alone, and how lanes slow each other.

Knows nothing about how the steps were run or which of them to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls

from clo.engine.measure import MachineRun
from clo.operation_costs import OperationCost, feature_values, price_key, work_kind
from clo.profile import Source
from clo.schedule import Lane, Op
from clo.schedule.graph import record_step
from clo.schedule.ops import price_name
from clo.timeline import Span, Timeline

Floats = NDArray[np.float64]

OUTLIER = 3.0
"""Durations beyond so many medians of their run are counted as that: the operating system took the processor away."""

MOST_SLOWED = 20.0
"""No lane slows another more than so many times over."""

KINDS = ("kernel", "gather", "copy", "threads", "runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One timed operation. `beside`: how much of its time each kind of work ran on other lanes."""

    run: int
    key: str
    kind: str
    features: dict[str, float]
    seconds: float
    beside: dict[str, float]


@dataclass(slots=True)
class Timed:
    """All observations of one price."""

    rows: list[Observation] = field(default_factory=list)

    def per_run(self) -> dict[int, list[Observation]]:
        """By the run in which they were made."""
        runs: dict[int, list[Observation]] = {}
        for row in self.rows:
            runs.setdefault(row.run, []).append(row)
        return runs


def observations(run: MachineRun, number: int) -> Iterator[Observation]:
    """Every operation of every step, with what its time may depend on."""
    ops = {(node.lane.value, node.op.name, node.op.layer): node.op for node in record_step(run.plan).nodes}
    for step, timeline in enumerate(run.timelines):
        by_lane = _by_lane(timeline, ops)
        for span in timeline.spans:
            op = ops.get((span.lane, span.name, span.layer))
            if op is None:
                continue
            yield Observation(
                run=number,
                key=price_key(price_name(op), op.work, run.plan),
                kind=work_kind(op.work),
                features={name: _at(value, step, op.layer) for name, value in _features(run, op).items()},
                seconds=span.end_s - span.start_s,
                beside=_beside(span, by_lane),
            )


def _features(run: MachineRun, op: Op) -> dict[str, Any]:
    return feature_values(op.work, run.plan, run.traffic)


def _at(value: Any, step: int, layer: int) -> float:
    return float(value) if np.ndim(value) == 0 else float(value[step, layer])


@dataclass(frozen=True, slots=True, eq=False)
class _Busy:
    """When a lane worked, and on what; ascending."""

    starts: Floats
    ends: Floats
    kinds: tuple[str, ...]


def _by_lane(timeline: Timeline, ops: dict[tuple[str, str, int], Op]) -> dict[str, _Busy]:
    spans: dict[str, list[Span]] = {}
    for span in timeline.spans:
        spans.setdefault(span.lane, []).append(span)
    return {
        lane: _Busy(
            np.array([span.start_s for span in found]),
            np.array([span.end_s for span in found]),
            tuple(_kind(ops.get((span.lane, span.name, span.layer))) for span in found),
        )
        for lane, found in spans.items()
    }


def _kind(op: Op | None) -> str:
    return work_kind(op.work) if op is not None else "runtime"


def _beside(span: Span, by_lane: dict[str, _Busy]) -> dict[str, float]:
    shares: dict[str, float] = {}
    length = span.end_s - span.start_s
    if length <= 0:
        return shares
    for lane, busy in by_lane.items():
        if lane == span.lane:
            continue
        first, last = np.searchsorted(busy.ends, span.start_s, "right"), np.searchsorted(busy.starts, span.end_s)
        for at in range(first, last):
            shared = min(busy.ends[at], span.end_s) - max(busy.starts[at], span.start_s)
            if shared > 0:
                shares[busy.kinds[at]] = shares.get(busy.kinds[at], 0.0) + shared / length
    return shares


def by_key(found: Iterable[Observation]) -> dict[str, Timed]:
    """Observations sorted by price."""
    sorted_: dict[str, Timed] = {}
    for row in found:
        sorted_.setdefault(row.key, Timed()).rows.append(row)
    return sorted_


def fit_costs(alone: dict[str, Timed]) -> dict[str, OperationCost]:
    """Costs of operations that ran by themselves: non-negative least squares of relative errors, each run one vote."""
    return {key: _fit(timed) for key, timed in alone.items()}


def _fit(timed: Timed) -> OperationCost:
    runs = timed.per_run()
    names = sorted({name for row in timed.rows for name in row.features})
    matrix, seconds, weights = [], [], []
    for rows in runs.values():
        typical = float(np.median([row.seconds for row in rows]))
        for row in rows:
            matrix.append([row.features.get(name, 0.0) for name in names])
            seconds.append(min(row.seconds, OUTLIER * typical))
            weights.append(1.0 / (max(typical, 1e-9) * np.sqrt(len(rows))))
    design, times, votes = np.array(matrix), np.array(seconds), np.array(weights)
    scale = np.maximum(design.max(axis=0), 1e-30)
    found, _ = nnls(design / scale * votes[:, None], times * votes)
    per_unit = {name: float(value) for name, value in zip(names, found / scale, strict=True) if value > 0}
    return OperationCost(
        source=Source.MEASURED, per_unit=per_unit, samples=len(times), spread=_spread(runs.values(), per_unit)
    )


def _spread(runs: Iterable[Sequence[Observation]], per_unit: dict[str, float]) -> float:
    """Root mean square of the relative errors of whole runs: what fit, machine and moment leave unexplained."""
    errors = []
    for rows in runs:
        typical = float(np.median([row.seconds for row in rows]))
        real = sum(min(row.seconds, OUTLIER * typical) for row in rows)
        errors.append(sum(predicted_s(row, per_unit) for row in rows) / real - 1.0 if real else 0.0)
    return float(np.sqrt(np.mean(np.square(errors))))


def predicted_s(row: Observation, per_unit: dict[str, float]) -> float:
    """Seconds alone."""
    return sum(per_unit.get(name, 0.0) * value for name, value in row.features.items())


@dataclass(frozen=True, slots=True)
class Interference:
    """`slowed` by price, `host_share` by kind of disturbing work (a kernel's is 1)."""

    slowed: dict[str, float]
    host_share: dict[str, float]


def fit_interference(beside: dict[str, Timed], costs: dict[str, OperationCost], rounds: int = 8) -> Interference:
    """From operations that ran beside others.

    An operation that is disturbed by work of share g runs at the rate 1 / (1 + slowed * g); its rate over its time adds
    up to the work it had to do, which is its time alone. The two sets of unknowns are solved in turn.
    """
    sums = {
        key: _Work.of(timed.rows, costs[key].per_unit)
        for key, timed in beside.items()
        if key in costs and timed.rows[0].kind != "runtime"
    }
    shares = dict.fromkeys(KINDS, 1.0)
    slowed = dict.fromkeys(sums, 1.0)
    for _ in range(rounds):
        slowed = {key: _root(lambda value, work=work: work.excess(value, shares)) for key, work in sums.items()}
        for kind in KINDS[1:]:
            touched = [(work, slowed[key]) for key, work in sums.items() if work.mostly_beside(kind)]
            if touched:
                shares[kind] = _root(
                    lambda value, kind=kind, touched=touched: sum(
                        work.excess(factor, shares | {kind: value}, only=kind) for work, factor in touched
                    )
                )
    return Interference(slowed, shares)


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """Observations of one price: `[n]` seconds, seconds alone, and `[n, kinds]` shares of time beside each kind."""

    seconds: Floats
    alone: Floats
    beside: Floats

    @classmethod
    def of(cls, rows: Sequence[Observation], per_unit: dict[str, float]) -> _Work:
        seconds = np.array([row.seconds for row in rows])
        alone = np.array([predicted_s(row, per_unit) for row in rows])
        beside = np.array([[row.beside.get(kind, 0.0) for kind in KINDS] for row in rows])
        keep = seconds < OUTLIER * (1 + beside.sum(axis=1)) * np.maximum(alone, 1e-9)
        return cls(seconds[keep], alone[keep], beside[keep])

    def excess(self, slowed: float, shares: dict[str, float], only: str | None = None) -> float:
        """Work done beyond the work there was, seconds: falls as `slowed` and `shares` grow."""
        share = np.array([shares[kind] for kind in KINDS])
        rows = self.beside[:, KINDS.index(only)] > 0.5 if only else np.ones(len(self.seconds), dtype=bool)
        beside = self.beside[rows]
        free = np.maximum(0.0, 1.0 - beside.sum(axis=1))
        # lanes that disturb at the same time are taken as if they followed one another; they rarely are more than one
        crowd = np.maximum(1.0, beside.sum(axis=1))[:, None]
        rate = free + (beside / crowd / (1.0 + slowed * share * crowd)).sum(axis=1)
        return float(self.seconds[rows] @ rate - self.alone[rows].sum())

    def mostly_beside(self, kind: str) -> bool:
        return int((self.beside[:, KINDS.index(kind)] > 0.5).sum()) >= 5


def _root(excess: Any) -> float:
    if excess(0.0) <= 0.0:
        return 0.0
    if excess(MOST_SLOWED) >= 0.0:
        return MOST_SLOWED
    return float(brentq(excess, 0.0, MOST_SLOWED, xtol=1e-3))


def handover_s(runs: Iterable[MachineRun]) -> float:
    """From the end of an operation to the start of one on another lane that waited for it: the mean, seconds."""
    gaps = [gap for run in runs for timeline in run.timelines for gap in _handovers(run, timeline)]
    return float(np.mean(np.minimum(gaps, OUTLIER * np.median(gaps)))) if gaps else 0.0


def _handovers(run: MachineRun, timeline: Timeline) -> Iterator[float]:
    nodes = record_step(run.plan).nodes
    spans = {(span.lane, span.name, span.layer): span for span in timeline.spans}
    for node in nodes:
        span = spans.get((node.lane.value, node.op.name, node.op.layer))
        awaited = [nodes[wait.node] for wait in node.after if nodes[wait.node].lane is not Lane.LAUNCH]
        if span is None or node.lane is Lane.LAUNCH or not awaited:
            continue
        ends = [spans.get((other.lane.value, other.op.name, other.op.layer)) for other in awaited]
        ready = max((other.end_s for other in ends if other is not None), default=0.0)
        yield max(0.0, span.start_s - max(ready, span.start_s - span.waited_s))
