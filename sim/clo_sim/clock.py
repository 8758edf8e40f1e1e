"""The clock: each operation starts when its lane and its inputs are ready. No event queue, no contention.

Evaluates all steps (of many designs, if they share a graph) at once with numpy. Knows nothing about shared resources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from clo.schedule import Cause, Lane
from clo_sim.priced import PricedStep, Segment
from clo_sim.step_times import StepTimes, Times


def step_seconds(priced: PricedStep) -> Times:
    """Duration of each step, `[steps]`: the sweep's fast path, without causes."""
    nothing = np.zeros(priced.num_steps)
    lane_end = dict.fromkeys(priced.graph.lanes(), nothing)
    # when others can see a segment's end
    shown: list[Times] = []
    handover_s, unseen_s = priced.handover_s, priced.unseen_s
    for number, (segment, seconds) in enumerate(zip(priced.segments, priced.durations, strict=True)):
        start = lane_end[segment.lane]
        for wait in segment.after:
            start = np.maximum(start, _seen(shown[wait.segment], segment.lane, handover_s))
        end = lane_end[segment.lane] = start + seconds
        shown.append(end + unseen_s[number] if number in unseen_s else end)
    return lane_end[Lane.LAUNCH]


def _seen(shown: Times, lane: Lane, handover_s: Mapping[Lane, float]) -> Times:
    """When `lane` sees what another one has done."""
    return shown + handover_s[lane] if lane in handover_s else shown


def segment_times(priced: PricedStep) -> Iterator[tuple[Times, Times, list[tuple[Cause, Times]]]]:
    """Start and end of every segment and its waits by cause, each `[steps]`.

    An operation's launch is waited for first, then its inputs in the order in which the schedule names them: the time
    until the first has come is its cause's, what the second takes beyond that is the second's, and so on.
    """
    nothing = np.zeros(priced.num_steps)
    lane_end = dict.fromkeys(priced.graph.lanes(), nothing)
    # when others can see a segment's end
    shown: list[Times] = []
    handover_s, unseen_s = priced.handover_s, priced.unseen_s
    for number, (segment, seconds) in enumerate(zip(priced.segments, priced.durations, strict=True)):
        start, waits = _start(segment, lane_end[segment.lane], shown, handover_s)
        end = start + seconds
        lane_end[segment.lane] = end
        shown.append(end + unseen_s[number] if number in unseen_s else end)
        yield start, end, waits


def _start(
    segment: Segment, free: Times, shown: list[Times], handover_s: Mapping[Lane, float]
) -> tuple[Times, list[tuple[Cause, Times]]]:
    start, waits = free, []
    for wait in segment.after:
        later = np.maximum(start, _seen(shown[wait.segment], segment.lane, handover_s))
        waits.append((wait.cause, later - start))
        start = later
    return start, waits


def run_clock(priced: PricedStep) -> StepTimes:
    """Step times with the main stream's gaps by cause and every lane's busy time."""
    steps = priced.num_steps
    busy = {lane: np.zeros(steps) for lane in priced.graph.lanes()}
    last = dict.fromkeys(busy, np.zeros(steps))
    gaps = {cause: np.zeros(steps) for cause in Cause}
    for segment, seconds, times in zip(priced.segments, priced.durations, segment_times(priced), strict=True):
        _, end, waits = times
        busy[segment.lane] += seconds
        last[segment.lane] = end
        if segment.lane is Lane.MAIN:
            for cause, waited in waits:
                gaps[cause] += waited
    gaps[Cause.SYNC] += last[Lane.LAUNCH] - last[Lane.MAIN]
    return StepTimes(
        seconds=last[Lane.LAUNCH],
        gaps=gaps,
        main_busy=busy[Lane.MAIN],
        main_alone=busy[Lane.MAIN],
        lane_busy=busy,
    )
