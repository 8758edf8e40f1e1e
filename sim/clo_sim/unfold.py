"""Timelines: one step with every operation on its lane, from the simulator or the clock.

Segments are unfolded into their operations, each stretched as its segment was. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np
import simpy

from clo.pricing import Seconds, link_bytes
from clo.schedule import Lane
from clo.schedule.work import Work
from clo.timeline import Span, Timeline
from clo_sim.clock import segment_times
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep
from clo_sim.simulator import CAUSES, SimulatedGpu

Waits = tuple[tuple[str, float], ...]

Ran = tuple[int, float, float, Waits]
"""A segment's column, start, end, and what its lane waited for before it."""


def simulated_timeline(
    priced: PricedStep, step: int, title: str, contention: Contention | None = None, *, everything: bool = False
) -> Timeline:
    """One measured step on the simulator; of a run that repeats its steps, the one it repeats.

    Operations that take no time are left out unless `everything` is wanted.
    """
    step %= priced.num_steps
    env = simpy.Environment()
    gpu = SimulatedGpu(env, priced, contention=contention, record=True)

    def run() -> Generator[simpy.Event, None, None]:
        yield from gpu.decode_step(step)

    env.process(run())
    env.run()
    columns: dict[Lane, list[int]] = {lane: [] for lane in priced.graph.lanes()}
    for column, segment in enumerate(priced.segments):
        columns[segment.lane].append(column)
    ran: list[Ran] = [
        (columns[gpu.lanes[span.lane]][span.position], span.start, span.end, _named(span.waits))
        for span in gpu.device.spans or ()
    ]
    ran += [(column, start, end, ()) for column, start, end in gpu.host_spans]
    return _timeline(priced, step, title, ran, everything=everything)


def clock_timeline(priced: PricedStep, step: int, title: str) -> Timeline:
    """One measured step on the clock; of a run that repeats its steps, the one it repeats."""
    step %= priced.num_steps
    ran: list[Ran] = []
    for column, (start, end, waits) in enumerate(segment_times(priced)):
        waited = tuple((cause.value, float(time[step])) for cause, time in waits if time[step] > 0)
        ran.append((column, float(start[step]), float(end[step]), waited))
    return _timeline(priced, step, title, ran)


def _timeline(priced: PricedStep, step: int, title: str, ran: list[Ran], *, everything: bool = False) -> Timeline:
    spans: list[Span] = []
    for segment in ran:
        spans += _unfold(priced, step, segment)
    if not everything:
        spans = list(_that_take_time(spans))
    order = {lane.value: number for number, lane in enumerate(Lane)}
    spans.sort(key=lambda span: (span.start_s, order[span.lane]))
    return Timeline(title=title, spans=tuple(spans), lanes=tuple(lane.value for lane in priced.graph.lanes()))


def _that_take_time(spans: list[Span]) -> Iterator[Span]:
    """What an operation that takes no time waited for, its lane's next one waited for."""
    waited: dict[str, Waits] = {}
    for span in spans:
        waits = (*waited.pop(span.lane, ()), *span.waits)
        if span.end_s > span.start_s:
            yield replace(span, waits=waits)
        elif waits:
            waited[span.lane] = waits


def _named(waits: tuple[tuple[int, float], ...]) -> Waits:
    return tuple((CAUSES[cause].value, seconds) for cause, seconds in waits)


def _unfold(priced: PricedStep, step: int, ran: Ran) -> list[Span]:
    column, start, end, waits = ran
    segment = priced.segments[column]
    nodes = [priced.graph.nodes[node] for node in segment.nodes]
    alone = [_at(priced.seconds(node.op), step) for node in nodes]
    total = sum(alone)
    edges = start + (end - start) * np.cumsum([0.0, *alone]) / total if total else [start] * (len(nodes) + 1)
    spans = []
    for number, node in enumerate(nodes):
        spans.append(
            Span(
                lane=segment.lane.value,
                name=node.op.name,
                layer=node.op.layer,
                part=node.op.part.value,
                start_s=float(edges[number]),
                end_s=float(edges[number + 1]),
                num_bytes=_bytes(priced, step, node.op.work, node.op.layer),
                waits=() if number else waits,
            )
        )
    return spans


def _at(value: Seconds, step: int) -> float:
    return float(value) if isinstance(value, float | int) else float(value[step])


def _bytes(priced: PricedStep, step: int, work: Work, layer: int) -> float:
    moved = link_bytes(work, priced.traffic)
    return float(moved) if isinstance(moved, float | int) else float(moved[step, layer])
