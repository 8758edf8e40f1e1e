"""A recorded step with its prices: operations merged into segments, and how long each takes in each step.

A segment is a run of operations of one lane that nothing outside needs to see apart: no wait comes in between, and no
other lane waits for a part of it. Clock and simulator both work on segments; timelines unfold them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clo.pricing import Demand, Pricer, Seconds
from clo.schedule import Cause, Lane, Op, StepGraph
from clo.schedule.work import Work
from clo.traffic import Traffic


@dataclass(frozen=True, slots=True)
class SegmentDependency:
    """Lane `lane` must have completed `count` segments."""

    lane: Lane
    count: int
    segment: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive nodes of one lane; `index` counts within the lane."""

    lane: Lane
    index: int
    nodes: tuple[int, ...]
    after: tuple[SegmentDependency, ...]


def segments_of(graph: StepGraph) -> tuple[Segment, ...]:
    """Merge what nothing needs apart; kernels and transfers stay apart because they contend differently."""
    waited_for = {wait.node for node in graph.nodes for wait in node.after}
    runs: list[list[int]] = []
    open_run: dict[Lane, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        run = open_run.get(node.lane)
        if run is None or node.after or run[-1] in waited_for or not _alike(graph, run[-1], index):
            run = open_run[node.lane] = []
            runs.append(run)
        run.append(index)
    return _linked(graph, runs)


def _alike(graph: StepGraph, first: int, second: int) -> bool:
    return _contends_as(graph.nodes[first].op.work) == _contends_as(graph.nodes[second].op.work)


def _contends_as(work: Work) -> str:
    kind = type(work).__name__
    return "Kernel" if kind in ("Gemm", "DecodeAttention", "StreamKernel") else kind


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


@dataclass(frozen=True)
class PricedStep:
    """A graph, its segments and prices for the measured steps of one traffic."""

    graph: StepGraph
    segments: tuple[Segment, ...]
    pricer: Pricer
    traffic: Traffic
    prices: dict[Work, Seconds]

    @property
    def num_steps(self) -> int:
        """Measured decode steps."""
        return self.traffic.num_steps

    def seconds(self, op: Op) -> Seconds:
        """Time of one operation alone: a float, or `[steps]`."""
        price = self.prices[op.work]
        return price if isinstance(price, float | int) else price[:, op.layer]

    def segment_seconds(self, segment: Segment) -> Seconds:
        """Time of a segment alone: a float, or `[steps]`."""
        fixed, varying = 0.0, None
        for node in segment.nodes:
            seconds = self.seconds(self.graph.nodes[node].op)
            if isinstance(seconds, float | int):
                fixed += seconds
            else:
                varying = seconds if varying is None else varying + seconds
        return fixed if varying is None else varying + fixed

    @cached_property
    def durations(self) -> NDArray[np.float64]:
        """`[steps, segments]`, seconds alone."""
        result = np.empty((self.num_steps, len(self.segments)))
        for number, segment in enumerate(self.segments):
            result[:, number] = self.segment_seconds(segment)
        return result

    def segment_demand(self, segment: Segment) -> Demand:
        """What a segment takes from shared resources: device-memory traffic averaged over its operations."""
        works = [self.graph.nodes[node].op for node in segment.nodes]
        seconds = sum(float(np.mean(self.seconds(op))) for op in works)
        num_bytes = sum(self._mean(self.pricer.hbm_bytes(op.work, self.traffic), op.layer) for op in works)
        return self.pricer.demand(works[0].work, seconds, num_bytes)

    @staticmethod
    def _mean(value: Seconds, layer: int) -> float:
        return float(value) if isinstance(value, float | int) else float(value[:, layer].mean())


def price_step(graph: StepGraph, segments: tuple[Segment, ...], pricer: Pricer, traffic: Traffic) -> PricedStep:
    """Price every distinct work once, for all steps and layers together."""
    works = {node.op.work for node in graph.nodes}
    return PricedStep(graph, segments, pricer, traffic, {work: pricer.seconds(work, traffic) for work in works})
