"""A recorded step with its prices: operations merged into segments, and how long each takes in each step.

A segment is a run of operations of one lane that nothing outside needs to see apart: no wait comes in between, and no
other lane waits for a part of it. Clock and simulator both work on segments; timelines unfold them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.pricing import Demand, PricedPart, Prices, Seconds, hbm_bytes
from clo.schedule import Cause, Lane, Op, StepGraph, record_step
from clo.schedule.ops import price_name
from clo.schedule.work import KernelWork, StreamKernel, Work
from clo.traffic import Traffic


class SegmentDependency(NamedTuple):
    """Lane `lane` must have completed so many segments."""

    lane: Lane
    completed: int
    segment: int
    cause: Cause


class Segment(NamedTuple):
    """Consecutive nodes of one lane; `position` counts within the lane."""

    lane: Lane
    position: int
    nodes: tuple[int, ...]
    after: tuple[SegmentDependency, ...]


def segments_of(graph: StepGraph) -> tuple[Segment, ...]:
    """Merge what nothing needs apart; kernels and transfers stay apart because they contend differently."""
    waited_for = {wait.node for node in graph.nodes for wait in node.after}
    runs: list[list[int]] = []
    open_run: dict[Lane, list[int]] = {}
    kind_of: dict[Lane, type] = {}
    for index, node in enumerate(graph.nodes):
        lane, kind = node.lane, _contends_as(node.op.work)
        run = open_run.get(lane)
        if run is None or node.after or kind is not kind_of[lane] or run[-1] in waited_for:
            run = open_run[lane] = []
            kind_of[lane] = kind
            runs.append(run)
        run.append(index)
    return _linked(graph, runs)


def _contends_as(work: Work) -> type:
    """Kernels contend alike; every other kind of work in its own way."""
    kind = type(work)
    return StreamKernel if issubclass(kind, KernelWork) else kind


def _linked(graph: StepGraph, runs: list[list[int]]) -> tuple[Segment, ...]:
    home = {node: number for number, run in enumerate(runs) for node in run}
    counted: dict[Lane, int] = {}
    place: list[int] = []
    for run in runs:
        lane = graph.nodes[run[0]].lane
        place.append(counted.get(lane, 0))
        counted[lane] = place[-1] + 1
    segments = []
    for number, run in enumerate(runs):
        first = graph.nodes[run[0]]
        after = tuple(
            SegmentDependency(graph.nodes[wait.node].lane, place[home[wait.node]] + 1, home[wait.node], wait.cause)
            for wait in first.after
        )
        segments.append(Segment(first.lane, place[number], tuple(run), after))
    return tuple(segments)


LONGEST_S = 1e30
"""No operation takes longer: sums of such times stay far from overflow."""


class Task(NamedTuple):
    """What has a price: an operation without its layer."""

    name: str
    work: Work

    @classmethod
    def of(cls, op: Op) -> Task:
        """The runtime's own operations go by what is done, whatever it is done for."""
        return cls(price_name(op), op.work)


@dataclass(frozen=True, slots=True)
class StepShape:
    """A graph cut into segments, with the places where each distinct task occurs. Made once for many pricings."""

    graph: StepGraph
    segments: tuple[Segment, ...]
    places: dict[Task, Places]

    @classmethod
    def of_plan(cls, plan: DecodePlan) -> StepShape:
        """Record the schedule of `plan`; the last shapes are remembered."""
        return _shape_of_plan(plan)

    @classmethod
    def of(cls, graph: StepGraph) -> StepShape:
        """Cut and index `graph`."""
        segments = segments_of(graph)
        found: dict[Task, list[tuple[int, int]]] = {}
        for number, segment in enumerate(segments):
            for node in segment.nodes:
                op = graph.nodes[node].op
                found.setdefault(Task.of(op), []).append((number, op.layer))
        return cls(graph, segments, {task: Places.of(pairs) for task, pairs in found.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The (segment, layer) pairs at which one work occurs."""

    segments: NDArray[np.intp]
    layers: NDArray[np.intp]

    @classmethod
    def of(cls, pairs: list[tuple[int, int]]) -> Places:
        """From a list of pairs."""
        columns = np.array(pairs, dtype=np.intp)
        return cls(columns[:, 0], columns[:, 1])

    def add(self, totals: NDArray[np.float64], value: Seconds) -> None:
        """Add `value` (a float or `[steps, layers]`) to the rows of `totals`, `[segments, steps]`."""
        if isinstance(value, float | int):
            np.add.at(totals, self.segments, value)
        else:
            np.add.at(totals, self.segments, value.T[self.layers])


@dataclass(frozen=True)
class PricedStep:
    """A step's shape with prices for the measured steps of one traffic."""

    shape: StepShape
    pricer: Prices
    traffic: Traffic
    prices: dict[Task, Seconds]

    @property
    def graph(self) -> StepGraph:
        """The recorded schedule."""
        return self.shape.graph

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The schedule cut into segments."""
        return self.shape.segments

    @property
    def num_steps(self) -> int:
        """Measured decode steps."""
        return self.traffic.num_steps

    def seconds(self, op: Op) -> Seconds:
        """Time of one operation alone: a float, or `[steps]`."""
        price = self.prices[Task.of(op)]
        return price if isinstance(price, float | int) else price[:, op.layer]

    @cached_property
    def durations(self) -> NDArray[np.float64]:
        """`[segments, steps]`, seconds alone."""
        fixed = np.zeros((len(self.segments), 1))
        varying = np.zeros((len(self.segments), self.num_steps))
        for task, places in self.shape.places.items():
            price = self.prices[task]
            places.add(fixed if isinstance(price, float | int) else varying, price)
        return varying + fixed

    @property
    def handover_s(self) -> Mapping[Lane, float]:
        """From the end of a segment until another lane, this one, sees it; nothing for a lane that is not named."""
        return self.pricer.handover_s

    @cached_property
    def unseen_s(self) -> dict[int, NDArray[np.float64]]:
        """From the end of a launching segment until other lanes can see it, `[steps]`; those seen at once are absent.

        A launching thread that keeps its processor lets nobody begin until it blocks, or until its turn is over.
        """
        hold = self.pricer.launch_hold_s
        launching = [n for n, segment in enumerate(self.segments) if segment.lane is Lane.LAUNCH] if hold else []
        unseen: dict[int, NDArray[np.float64]] = {}
        rest = np.zeros(self.num_steps)
        for number in reversed(launching):
            if rest.any():
                unseen[number] = np.minimum(rest, hold)
            # it blocks before what waits for another lane
            rest = np.zeros(self.num_steps) if self.segments[number].after else rest + self.durations[number]
        return unseen

    @cached_property
    def demands(self) -> list[Demand]:
        """What each segment takes from shared resources: device-memory traffic averaged over its operations."""
        moved = np.zeros((len(self.segments), self.num_steps))
        for task, places in self.shape.places.items():
            places.add(moved, hbm_bytes(task.work, self.traffic))
        means = {task: np.mean(price, axis=0) if np.ndim(price) else price for task, price in self.prices.items()}
        return [
            self.pricer.segment_demand([self._part(means, node) for node in segment.nodes], float(mean_bytes))
            for segment, mean_bytes in zip(self.segments, moved.mean(axis=1), strict=True)
        ]

    def _part(self, means: dict[Task, Seconds], node: int) -> PricedPart:
        op = self.graph.nodes[node].op
        mean = means[Task.of(op)]
        return PricedPart(price_name(op), op.work, mean if isinstance(mean, float | int) else float(mean[op.layer]))


@lru_cache(maxsize=8)
def _shape_of_plan(plan: DecodePlan) -> StepShape:
    return StepShape.of(record_step(plan))


def price_step(shape: StepShape, pricer: Prices, traffic: Traffic) -> PricedStep:
    """Price every distinct work once, for all steps and layers together. Raises `SpecError` for a time without end."""
    with np.errstate(over="ignore"):
        prices = {task: pricer.seconds(task.work, traffic, task.name) for task in shape.places}
    for task, price in prices.items():
        if not np.isfinite(price).all() or np.max(price) > LONGEST_S:
            raise SpecError(
                f"{type(task.work).__name__} takes {np.max(price):g} s: check machine.* rates and profile.* costs"
            )
    return PricedStep(shape, pricer, traffic, prices)
