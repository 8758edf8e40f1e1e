"""From the marks of a CUDA step (events on streams, clocks on threads) to the timeline that every machine gives.

A lane is in order, so that its idle time before an operation is what that operation waited for. Device and host clocks
meet at the step's first event, which the idle device reaches within a launch's latency. Knows nothing about devices but
how to subtract two events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clo.schedule import Cause, Lane, Op, Part, Token
from clo.schedule.graph import runtime_op
from clo.timeline import Span, Timeline

UNEXPLAINED_S = 1e-6
"""Idle time below this is the stream's own, not a wait."""

WHOLE_STEP = "whole step"


class Waited(NamedTuple):
    """A lane went on after `token`."""

    token: Token
    cause: Cause


@dataclass(slots=True)
class Mark:
    """One operation on one lane. Events are a stream's; clocks (`began_s`, `ended_s`) a thread's.

    `order` is the event that others wait for; none where a thread does or submits the operation.
    `polls`: the operation is a kernel that waits for this. `rings`: the end of a doorbell kernel on the lane after the
    operation; `hears`: the operation that rang. `late`: what the lane waited for if it was idle until `submitted_s`.
    """

    lane: Lane
    op: Op
    waits: tuple[Waited, ...] = ()
    late: Cause = Cause.LAUNCH
    submitted_s: float | None = None
    start: Any = None
    end: Any = None
    order: Any = None
    rings: Any = None
    hears: Token | None = None
    polls: Waited | None = None
    began_s: float = 0.0
    ended_s: float = 0.0


@dataclass(slots=True)
class HostMark:
    """What the launching thread did, seconds of its clock."""

    op: Op
    began_s: float
    ended_s: float
    waits: tuple[tuple[str, float], ...] = ()


Since = Callable[[Any], float]
"""Seconds from the beginning of the step to an event."""


@dataclass(frozen=True, slots=True)
class _Clock:
    """Seconds since the step began: when operations ended, and when doorbells had been rung."""

    zero_s: float
    since: Since
    ends: dict[Token, float]
    rings: dict[Token, float]


@dataclass(slots=True)
class _Lane:
    free_s: float = 0.0
    inputs: list[tuple[float, Cause]] = field(default_factory=list)


def timeline(
    title: str,
    marks: Sequence[Mark],
    host: Iterable[HostMark],
    *,
    zero_s: float,
    since: Since,
    moved_bytes: Callable[[Op], float],
) -> Timeline:
    """Every operation with what its lane waited for; `zero_s` is the host's clock at the step's beginning."""
    clock = _Clock(
        zero_s,
        since,
        {Token(at): _end(mark, zero_s, since) for at, mark in enumerate(marks)},
        {Token(at): since(mark.rings) for at, mark in enumerate(marks) if mark.rings is not None},
    )
    lanes = {lane: _Lane() for lane in Lane}
    spans = [_host_span(mark, zero_s) for mark in host]
    for at, mark in enumerate(marks):
        spans.append(_span(Token(at), mark, lanes[mark.lane], clock, moved_bytes(mark.op)))
    return _timeline(title, spans)


def whole_step(title: str, host: Iterable[HostMark], *, zero_s: float, seconds: float) -> Timeline:
    """Where operations were not timed: one span for all of them."""
    op = runtime_op("graph_launch", 0)
    whole = Span(
        lane=Lane.MAIN.value, name=WHOLE_STEP, layer=op.layer, part=Part.MODEL.value, start_s=0.0, end_s=seconds
    )
    return _timeline(f"{title}, operations not timed", [*(_host_span(mark, zero_s) for mark in host), whole])


def _timeline(title: str, spans: list[Span]) -> Timeline:
    used = {span.lane for span in spans}
    ordered = tuple(sorted(spans, key=lambda span: span.start_s))
    return Timeline(title=title, spans=ordered, lanes=tuple(lane.value for lane in Lane if lane.value in used))


def _host_span(mark: HostMark, zero_s: float) -> Span:
    return Span(
        lane=Lane.LAUNCH.value,
        name=mark.op.name,
        layer=mark.op.layer,
        part=mark.op.part.value,
        start_s=max(0.0, mark.began_s - zero_s),
        end_s=max(0.0, mark.ended_s - zero_s),
        waits=mark.waits,
    )


def _end(mark: Mark, zero_s: float, since: Since) -> float:
    return max(0.0, mark.ended_s - zero_s) if mark.end is None else max(0.0, since(mark.end))


def _span(token: Token, mark: Mark, lane: _Lane, clock: _Clock, num_bytes: float) -> Span:
    inputs = [*lane.inputs, *((clock.ends[wait.token], wait.cause) for wait in mark.waits)]
    if mark.submitted_s is not None:
        inputs.append((mark.submitted_s - clock.zero_s, mark.late))
    start = _start(mark, lane.free_s, [when for when, _ in inputs], clock)
    end = max(clock.ends[token], start)
    waits = _waits(lane.free_s, start, inputs, mark.late)
    if mark.polls is not None:
        # until what is waited for was there; what is left is what the looking costs
        until = min(max(start, clock.ends[mark.polls.token]), end)
        waits, start = (*waits, (mark.polls.cause.value, until - start)), until
    lane.free_s = end
    lane.inputs = [(clock.rings[token], Cause.SYNC)] if token in clock.rings else []
    return Span(
        lane=mark.lane.value,
        name=mark.op.name,
        layer=mark.op.layer,
        part=mark.op.part.value,
        start_s=start,
        end_s=end,
        num_bytes=num_bytes,
        waits=waits,
    )


def _start(mark: Mark, free_s: float, inputs: Sequence[float], clock: _Clock) -> float:
    """A recorded operation that waits for nothing begins where its lane's last one ended."""
    if mark.start is not None:
        return max(free_s, clock.since(mark.start))
    if mark.end is not None:
        return max([free_s, *inputs])
    began = mark.began_s - clock.zero_s
    if mark.hears in clock.rings:  # from the ring until it was heard
        began = min(began, clock.rings[mark.hears])
    return max(free_s, began)


def _waits(
    free_s: float, start: float, inputs: Sequence[tuple[float, Cause]], late: Cause
) -> tuple[tuple[str, float], ...]:
    """Idle time by cause, in the order in which inputs came; what none explains is the last one's."""
    waits: list[tuple[str, float]] = []
    cause = late
    for when, cause in sorted(inputs):
        until = min(when, start)
        if until > free_s:
            waits.append((cause.value, until - free_s))
            free_s = until
    if start - free_s > UNEXPLAINED_S:
        if waits and waits[-1][0] == cause.value:
            free_s -= waits.pop()[1]
        waits.append((cause.value, start - free_s))
    return tuple(waits)
