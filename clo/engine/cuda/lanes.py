"""Lanes as streams: puts operations on them, after what they wait for, with the events that time and order them.

Knows nothing about graphs beyond how their events differ, and nothing about transfer threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from clo.engine.cuda.device import DeviceApi, Event
from clo.engine.cuda.spans import Mark
from clo.engine.cuda.step import Mode, SubmittedStep
from clo.engine.faults import FailedOperationError
from clo.errors import EngineError
from clo.schedule import Lane, Op, Token
from clo.schedule.work import Copy

STREAMS = (Lane.MAIN, Lane.PREFETCH, Lane.H2D, Lane.D2H)

SUBMISSION_S, MANY_SUBMISSIONS_S = 5e-4, 2e-2
"""Longer than the launching thread takes to submit an operation, and one that is a copy of every page."""


class StreamLanes:
    """A stream for each lane of the device. With `one_at_a_time` an operation waits until all of it is submitted."""

    def __init__(self, device: DeviceApi, *, patience_s: float, one_at_a_time: bool) -> None:
        self._device, self._patience_s, self._one_at_a_time = device, patience_s, one_at_a_time
        self.streams = {lane: device.stream(lane.value) for lane in STREAMS}

    def come_after(self, before: Event) -> None:
        """The main stream goes on after an event of another one."""
        main = self.streams[Lane.MAIN]
        with self._device.on(main):
            self._device.wait(main, before)

    def start_clock(self, now: SubmittedStep) -> None:
        """Host and device begin to count."""
        main = self.streams[Lane.MAIN]
        with self._device.on(main):
            now.opened = self._device.event(timed=True)
            now.zero_s = now.free_s = time.perf_counter()
            self._device.record(now.opened, main)

    def stop_clock(self, now: SubmittedStep) -> None:
        """The step ends here on the main stream."""
        main = self.streams[Lane.MAIN]
        with self._device.on(main):
            now.finished = self._device.event(timed=True)
            self._device.record(now.finished, main)

    def enter(self, now: SubmittedStep, first: Callable[[], None]) -> None:
        """The `first` thing on the main stream; other lanes come after its beginning."""
        now.is_open = True
        now.entered.add(Lane.MAIN)
        main = self.streams[Lane.MAIN]
        with self._device.on(main):
            now.forked = self._device.event(timed=False)
            self._device.record(now.forked, main)
            first()

    def put(self, now: SubmittedStep, lane: Lane, op: Op, do: Callable[[], None], *, timed: bool) -> Token:
        """`op` is next on `lane`; `do` submits it."""
        token = now.mark(lane, op)
        mark, stream = now.marks[token], self.streams[lane]
        recorded = now.mode is Mode.CAPTURE
        with self._device.on(stream):
            self.join_in(now, lane)
            for wait in mark.waits:
                self._follow(now, lane, wait.token)
            if self._one_at_a_time:
                self._device.delay(MANY_SUBMISSIONS_S if isinstance(op.work, Copy) else SUBMISSION_S)
            if timed and (not recorded or mark.waits or lane not in now.used):
                mark.start = self._device.event(timed=True, recorded=recorded)
                self._device.record(mark.start, stream)
            attempt(op, do)
            self._mark_end(mark, timed=timed, recorded=recorded)
        now.used.add(lane)
        return token

    def _mark_end(self, mark: Mark, *, timed: bool, recorded: bool) -> None:
        """A graph's own events order streams; those that are read after a replay are others."""
        stream = self.streams[mark.lane]
        if timed and recorded:
            mark.end = self._device.event(timed=True, recorded=True)
            self._device.record(mark.end, stream)
            mark.order = self._device.event(timed=False)
            self._device.record(mark.order, stream)
            return
        mark.end = mark.order = self._device.event(timed=timed)
        self._device.record(mark.end, stream)

    def join_in(self, now: SubmittedStep, lane: Lane) -> None:
        """The first operation of a lane comes after the step's beginning."""
        if lane not in now.entered:
            now.entered.add(lane)
            self._device.wait(self.streams[lane], now.forked)

    def _follow(self, now: SubmittedStep, lane: Lane, token: Token) -> None:
        """The stream of `lane` goes on after `token`; a thread's operation has to be over by now."""
        mark = now.marks[token]
        if mark.order is not None:
            if mark.lane is not lane:
                self._device.wait(self.streams[lane], mark.order)
        elif not now.ledger.wait(token, self._patience_s):
            raise FailedOperationError(mark.op, EngineError(f"not done in {self._patience_s:g} s"))

    def come_together(self, now: SubmittedStep) -> None:
        """The main stream goes on after every lane that has been used."""
        main = self.streams[Lane.MAIN]
        with self._device.on(main):
            for lane in STREAMS:
                if lane in now.entered and lane is not Lane.MAIN:
                    joined = self._device.event(timed=False)
                    with self._device.on(self.streams[lane]):
                        self._device.record(joined, self.streams[lane])
                    self._device.wait(main, joined)


def attempt(op: Op, do: Callable[[], None]) -> None:
    """Do it; what goes wrong is told with the operation's name."""
    try:
        do()
    except BaseException as error:
        raise FailedOperationError(op, error) from error
