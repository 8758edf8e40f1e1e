"""The clock: each operation starts when its lane and its inputs are ready. No event queue, no contention.

Evaluates all steps (of many designs, if they share a graph) at once with numpy. Knows nothing about shared resources.
"""

from __future__ import annotations

import numpy as np

from clo.metrics import StepTimes, Times
from clo.pricing import Seconds
from clo.schedule import Cause, Lane
from clo_sim.priced import PricedStep, Segment


def step_seconds(priced: PricedStep) -> Times:
    """Duration of each step, `[steps]`: the sweep's fast path, without causes."""
    lane_end: dict[Lane, Seconds] = {}
    ends: list[Seconds] = []
    for segment in priced.segments:
        start = lane_end.get(segment.lane, 0.0)
        for wait in segment.after:
            start = _later(start, ends[wait.segment])
        end = start + priced.segment_seconds(segment)
        lane_end[segment.lane] = end
        ends.append(end)
    return _as_steps(lane_end[Lane.LAUNCH], priced.num_steps)


def run_clock(priced: PricedStep) -> StepTimes:
    """Step times with the main stream's gaps by cause and every lane's busy time."""
    steps = priced.num_steps
    lane_end = {lane: np.zeros(steps) for lane in priced.graph.lanes()}
    busy = {lane: np.zeros(steps) for lane in lane_end}
    gaps = {cause: np.zeros(steps) for cause in Cause}
    ends: list[Times] = []
    for number, segment in enumerate(priced.segments):
        start = _start(segment, lane_end[segment.lane], ends, gaps if segment.lane is Lane.MAIN else None)
        end = start + priced.durations[:, number]
        busy[segment.lane] += priced.durations[:, number]
        lane_end[segment.lane] = end
        ends.append(end)
    seconds = lane_end[Lane.LAUNCH]
    gaps[Cause.SYNC] += seconds - lane_end[Lane.MAIN]
    return StepTimes(
        seconds=seconds,
        gaps=gaps,
        main_busy=busy[Lane.MAIN],
        main_alone=busy[Lane.MAIN],
        lane_busy=busy,
    )


def _start(segment: Segment, free: Times, ends: list[Times], gaps: dict[Cause, Times] | None) -> Times:
    """When a segment starts; its gap goes to the input that came last (the first of equals)."""
    start = free
    for wait in segment.after:
        start = np.maximum(start, ends[wait.segment])
    if gaps is not None and segment.after:
        open_gap = start - free
        for wait in segment.after:
            binds = (ends[wait.segment] == start) & (open_gap > 0)
            gaps[wait.cause] += np.where(binds, open_gap, 0.0)
            open_gap = np.where(binds, 0.0, open_gap)
    return start


def _later(first: Seconds, second: Seconds) -> Seconds:
    if isinstance(first, float | int) and isinstance(second, float | int):
        return max(first, second)
    return np.maximum(first, second)


def _as_steps(value: Seconds, steps: int) -> Times:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), (steps,))
