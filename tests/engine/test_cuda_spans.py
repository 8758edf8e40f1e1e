"""Timelines from events: what a lane waited for, worked out by hand. Events are seconds since the step began."""

from __future__ import annotations

import pytest

from clo.engine.cuda.spans import HostMark, Mark, Waited, timeline, whole_step
from clo.schedule import Cause, Lane, Op, Part, Token
from clo.schedule.work import HostAction
from clo.timeline import Span, Timeline

ZERO = 1000.0
"""The host's clock when the step began."""


def op(name: str) -> Op:
    return Op(name, 0, Part.MODEL, HostAction("kernel_launch"))


def timeline_of(*marks: Mark) -> Timeline:
    return timeline("t", marks, [], zero_s=ZERO, since=lambda event: float(event), moved_bytes=lambda _: 7.0)


def span(found: Timeline, name: str) -> Span:
    (one,) = [span for span in found.spans if span.name == name]
    return one


def test_idle_time_goes_to_inputs_in_the_order_in_which_they_came() -> None:
    found = timeline_of(
        Mark(Lane.MAIN, op("first"), start=0.0, end=1.0),
        Mark(Lane.PREFETCH, op("pages"), start=0.0, end=3.0),
        Mark(
            Lane.MAIN,
            op("second"),
            waits=(Waited(Token(1), Cause.PREFETCH),),
            late=Cause.SYNC,
            submitted_s=ZERO + 2.0,
            start=3.5,
            end=4.0,
        ),
    )
    second = span(found, "second")
    # idle from 1: submitted at 2, the pages came at 3, and it began at 3.5
    assert second.waits == (("sync", 1.0), ("late prefetch", 1.5))
    assert (second.start_s, second.end_s, second.num_bytes) == (3.5, 4.0, 7.0)


def test_what_came_before_the_lane_was_free_is_no_wait() -> None:
    found = timeline_of(
        Mark(Lane.PREFETCH, op("pages"), start=0.0, end=1.0),
        Mark(Lane.MAIN, op("first"), start=0.0, end=2.0),
        Mark(Lane.MAIN, op("second"), waits=(Waited(Token(0), Cause.PREFETCH),), end=3.0),
    )
    assert span(found, "second").waits == ()
    assert span(found, "second").start_s == 2.0


def test_a_recorded_operation_begins_where_the_last_one_ended() -> None:
    found = timeline_of(Mark(Lane.MAIN, op("first"), start=0.5, end=1.0), Mark(Lane.MAIN, op("second"), end=3.0))
    assert span(found, "first").waits == (("launch", 0.5),)
    assert (span(found, "second").start_s, span(found, "second").waits) == (1.0, ())


def test_a_poll_is_a_wait_until_the_data_was_there_and_costs_the_rest() -> None:
    found = timeline_of(
        Mark(Lane.MAIN, op("select"), start=0.0, end=1.0, rings=1.25),
        Mark(Lane.POOL, op("doorbell"), late=Cause.SYNC, hears=Token(0), began_s=ZERO + 1.5, ended_s=ZERO + 1.5),
        Mark(Lane.H2D, op("copy"), waits=(Waited(Token(1), Cause.HOST_WORK),), start=2.0, end=4.0),
        Mark(Lane.MAIN, op("ready_flag"), start=1.25, end=4.5, polls=Waited(Token(2), Cause.DEMAND)),
    )
    poll, doorbell = span(found, "ready_flag"), span(found, "doorbell")
    # the doorbell's kernel took a quarter of a second of the stream, and was heard a quarter later
    assert poll.waits == (("sync", 0.25), ("on-demand transfer", 2.75))
    assert (poll.start_s, poll.end_s) == (4.0, 4.5)
    assert (doorbell.start_s, doorbell.end_s) == (1.25, 1.5)
    assert span(found, "copy").waits == (("CPU work", 2.0),)


def test_a_step_without_times_has_one_span_and_says_so() -> None:
    host = [HostMark(op("graph_launch"), ZERO, ZERO + 0.5), HostMark(op("read_back"), ZERO + 0.5, ZERO + 2.5)]
    found = whole_step("t", host, zero_s=ZERO, seconds=2.0)
    assert [span.name for span in found.spans if span.lane == Lane.MAIN.value] == ["whole step"]
    assert found.title == "t, operations not timed"
    assert found.seconds == pytest.approx(2.5)
