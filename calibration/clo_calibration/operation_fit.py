"""From timed decode steps to the costs of operations: what each takes alone.

Knows nothing about how the steps were run or which of them to run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from clo.engine.measure import MachineRun
from clo.operation_costs import OperationCost, feature_values, is_runtime, price_key
from clo.profile import Source
from clo.schedule import Op
from clo.schedule.graph import record_step
from clo.schedule.ops import price_name
from clo.timeline import Span, Timeline

Floats = NDArray[np.float64]

Group = tuple[str, ...]
"""Prices of operations that run at the same time on different lanes, sorted."""

OUTLIER = 3.0
"""Durations beyond so many medians of their run, or so many times what such work takes in most cases, count as that:
the operating system took the processor away.
"""

PASSES = 30
"""Of reweighting, until absolute errors are least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One timed operation. `beside`: for what share of its time which prices ran on other lanes."""

    run: int
    key: str
    is_runtime: bool
    features: dict[str, float]
    seconds: float
    beside: dict[Group, float]


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
    keys = {place: price_key(price_name(op), op.work, run.plan) for place, op in ops.items()}
    for step, timeline in enumerate(run.timelines):
        by_lane = _by_lane(timeline, keys)
        for span in timeline.spans:
            op = ops.get((span.lane, span.name, span.layer))
            if op is None:
                continue
            yield Observation(
                run=number,
                key=keys[span.lane, span.name, span.layer],
                is_runtime=is_runtime(op.work),
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
    keys: tuple[str, ...]


def _by_lane(timeline: Timeline, keys: dict[tuple[str, str, int], str]) -> dict[str, _Busy]:
    spans: dict[str, list[Span]] = {}
    for span in timeline.spans:
        spans.setdefault(span.lane, []).append(span)
    return {
        lane: _Busy(
            np.array([span.start_s for span in found]),
            np.array([span.end_s for span in found]),
            tuple(keys.get((span.lane, span.name, span.layer), "") for span in found),
        )
        for lane, found in spans.items()
    }


def _beside(span: Span, by_lane: dict[str, _Busy]) -> dict[Group, float]:
    """For what share of `span` which operations ran on other lanes."""
    length = span.end_s - span.start_s
    if length <= 0:
        return {}
    others = [overlap for lane, busy in by_lane.items() if lane != span.lane for overlap in _overlaps(span, busy)]
    cuts = sorted({span.start_s, span.end_s, *(cut for overlap in others for cut in overlap[:2])})
    shares: dict[Group, float] = {}
    for start, end in pairwise(cuts):
        if group := tuple(sorted(key for first, last, key in others if first <= start and end <= last)):
            shares[group] = shares.get(group, 0.0) + (end - start) / length
    return shares


def _overlaps(span: Span, busy: _Busy) -> Iterator[tuple[float, float, str]]:
    first, last = np.searchsorted(busy.ends, span.start_s, "right"), np.searchsorted(busy.starts, span.end_s)
    for at in range(first, last):
        start, end = max(busy.starts[at], span.start_s), min(busy.ends[at], span.end_s)
        if end > start:
            yield float(start), float(end), busy.keys[at]


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
    rows = _Rows.of(timed)
    counted = np.minimum(rows.seconds, rows.limits())
    found = rows.solved(counted, rows.votes)
    per_unit = {name: float(value) for name, value in zip(rows.names, found, strict=True) if value > 0}
    spread = rows.spread(found, counted)
    return OperationCost(source=Source.MEASURED, per_unit=per_unit, samples=len(counted), spread=spread)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """All observations of one price: features `[rows, names]`, seconds, number of the run, its median, and votes."""

    names: tuple[str, ...]
    features: Floats
    seconds: Floats
    run: NDArray[np.intp]
    typical: Floats
    votes: Floats

    @classmethod
    def of(cls, timed: Timed) -> _Rows:
        names = tuple(sorted({name for row in timed.rows for name in row.features}))
        seconds = np.array([row.seconds for row in timed.rows])
        _, run, counts = np.unique([row.run for row in timed.rows], return_inverse=True, return_counts=True)
        typical = _medians(seconds, run)
        return cls(
            names=names,
            features=np.array([[row.features.get(name, 0.0) for name in names] for row in timed.rows]),
            seconds=seconds,
            run=run,
            typical=typical,
            votes=1.0 / (np.maximum(typical, 1e-9) * np.sqrt(counts[run])),
        )

    def solved(self, seconds: Floats, votes: Floats) -> Floats:
        """Seconds per unit of each feature: least squares."""
        scale = np.maximum(self.features.max(axis=0), 1e-30)
        found, _ = nnls(self.features / scale * votes[:, None], seconds * votes)
        return np.asarray(found / scale)

    def limits(self) -> Floats:
        """What is beyond belief, by row. An operation that seldom has anything to do may take many medians then."""
        votes = self.votes
        for _ in range(PASSES):
            work = self.features @ self.solved(self.seconds, votes)
            off = np.abs(work - self.seconds) / np.maximum(self.typical, 1e-9)
            votes = self.votes / np.sqrt(np.maximum(off, 1e-3))
        return OUTLIER * np.maximum(self.typical, work)

    def spread(self, per_unit: Floats, seconds: Floats) -> float:
        """Root mean square of the relative errors of whole runs: what fit, machine and moment leave unexplained."""
        real, fitted = np.bincount(self.run, seconds), np.bincount(self.run, self.features @ per_unit)
        known = real > 0
        return float(np.sqrt(np.mean(np.square(fitted[known] / real[known] - 1.0)))) if known.any() else 0.0


def _medians(values: Floats, run: NDArray[np.intp]) -> Floats:
    """Of each row's run."""
    return np.array([np.median(values[run == number]) for number in range(run.max() + 1)])[run]


def undisturbed(rows: Sequence[Observation], per_unit: dict[str, float]) -> list[Observation]:
    """Operations of one run, but for those that took much longer than most and than their work takes alone."""
    typical = float(np.median([row.seconds for row in rows]))
    return [row for row in rows if row.seconds <= OUTLIER * max(typical, predicted_s(row, per_unit))]


def predicted_s(row: Observation, per_unit: dict[str, float]) -> float:
    """Seconds alone."""
    return sum(per_unit.get(name, 0.0) * value for name, value in row.features.items())
