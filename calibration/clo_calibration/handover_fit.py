"""How long lanes take to see what others have done, from decode steps in which they ran side by side.

The rule is the simulator's: a lane sees the end of another one's operation so much later, and what the launching thread
submits when that thread next blocks. Knows nothing about how steps were run.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clo.engine.measure import MachineRun
from clo.schedule import Lane
from clo.schedule.graph import Node, record_step
from clo.timeline import Span, Timeline


class Handover(NamedTuple):
    """A lane that slept begins operation `node` so much after what it waited for was there to be seen; seconds."""

    node: int
    gap_s: float
    by_launch: bool


def launch_hold_s(runs: Sequence[MachineRun]) -> float:
    """How long the launching thread hides what it submits: a turn of Python's interpreter lock, or not at all (0).

    Whichever makes the delays of the lanes that it wakes more alike.
    """
    turn = sys.getswitchinterval()
    spreads = []
    for hold in (0.0, turn):
        by_lane: dict[Lane, list[float]] = {}
        for run in runs:
            nodes = record_step(run.plan).nodes
            for timeline in run.timelines:
                for found in _handovers(nodes, timeline, hold):
                    if found.by_launch:
                        by_lane.setdefault(nodes[found.node].lane, []).append(found.gap_s)
        spreads.append(sum(float(np.abs(gaps - np.median(gaps)).sum()) for gaps in map(np.array, by_lane.values())))
    return turn if spreads[1] < spreads[0] else 0.0


def handover_s(runs: Iterable[MachineRun], hold_s: float) -> dict[Lane, float]:
    """From when something can be seen until a lane that slept until then begins: the mean by lane, seconds.

    Of one hand-over in the steps of a run the median counts each time: what comes once is the operating system's.
    """
    gaps: dict[Lane, list[float]] = {}
    for run in runs:
        nodes, of_node = record_step(run.plan).nodes, dict[int, list[float]]()
        for timeline in run.timelines:
            for found in _handovers(nodes, timeline, hold_s):
                of_node.setdefault(found.node, []).append(max(0.0, found.gap_s))
        for number, same in of_node.items():
            gaps.setdefault(nodes[number].lane, []).extend([float(np.median(same))] * len(same))
    return {lane: float(np.mean(found)) for lane, found in sorted(gaps.items())}


def _handovers(nodes: Sequence[Node], timeline: Timeline, hold_s: float) -> Iterator[Handover]:
    """A lane that was busy when its input came goes on at once, and tells nothing."""
    spans = _spans_of(nodes, timeline)
    shown = _shown(nodes, spans, hold_s)
    free: dict[Lane, float] = {}
    for number, (node, here) in enumerate(zip(nodes, spans, strict=True)):
        if here is None:
            continue
        inputs = [(shown[wait.node], nodes[wait.node].lane) for wait in node.after if spans[wait.node] is not None]
        ready, lane = max(inputs, default=(0.0, node.lane))
        if ready > free.get(node.lane, 0.0):
            yield Handover(number, here.start_s - ready, lane is Lane.LAUNCH)
        free[node.lane] = here.end_s


def _spans_of(nodes: Sequence[Node], timeline: Timeline) -> list[Span | None]:
    """Each operation as it ran; operations that share lane, name and layer come in their order."""
    of_name: dict[tuple[str, str, int], deque[Span]] = {}
    for span in timeline.spans:
        of_name.setdefault((span.lane, span.name, span.layer), deque()).append(span)
    empty: deque[Span] = deque()
    found = (of_name.get((node.lane.value, node.op.name, node.op.layer), empty) for node in nodes)
    return [same.popleft() if same else None for same in found]


def _shown(nodes: Sequence[Node], spans: Sequence[Span | None], hold_s: float) -> list[float]:
    """When each operation's end can be seen by other lanes."""
    shown = [0.0 if span is None else span.end_s for span in spans]
    blocks = float("inf")
    for number in reversed([n for n, node in enumerate(nodes) if node.lane is Lane.LAUNCH and spans[n] is not None]):
        # the last thing that the launching thread does before it blocks
        blocks = shown[number] if blocks == float("inf") else blocks
        shown[number] = min(shown[number] + hold_s, blocks)
        if nodes[number].after:
            blocks = float("inf")
    return shown
