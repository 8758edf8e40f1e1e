"""The abstract machine on CUDA: lanes are streams, waits are events, a graph is recorded once and replayed.

The first step runs one operation after another, which loads and compiles everything. A step with `begin_graph` is
recorded in the second and replayed from then on, until what it depends on changes. Knows the verbs of a schedule and
when what they submitted ran; nothing about tensors. **Not yet run on a GPU.**
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from typing import Protocol

from clo.engine.cuda.device import FLAG_SITES, DeviceApi, Event, Flags
from clo.engine.cuda.lanes import STREAMS, StreamLanes, attempt
from clo.engine.cuda.spans import Mark, Waited, timeline, whole_step
from clo.engine.cuda.step import Mode, RecordedStep, SubmittedStep
from clo.engine.cuda.threads import Errand, Ledger, TransferThread
from clo.engine.cuda.waits import BoundedWaits
from clo.engine.faults import FailedOperationError, explained
from clo.engine.words import Words
from clo.errors import EngineError
from clo.schedule import Cause, HostWait, Lane, Op, Step, Token
from clo.schedule.graph import runtime_op, submission
from clo.timeline import Timeline

FLAG_PATIENCE = 0.25
"""A kernel gives up before the host does: then the report says which flag it was."""


class Work(Protocol):
    """What operations do, on the current stream or on the host."""

    def run(self, op: Op) -> None:
        """Do it, or submit it."""

    def moved_bytes(self, op: Op) -> float:
        """Bytes that it moved over the host link; asked once the step is over."""

    def letter(self, op: Op) -> Words | None:
        """What it found that the host must know."""

    def key(self) -> Hashable:
        """What a recorded step depends on; it is recorded anew when this changes."""


class CudaMachine:
    """Runs steps of a schedule on streams and one transfer thread. Close it, or use it in a `with` block.

    After a step has failed the lanes are idle again and the next step may begin. `one_at_a_time`: nothing overlaps.
    Without `timed` a timeline has one span for the device.
    """

    def __init__(
        self,
        work: Work,
        device: DeviceApi,
        *,
        patience_s: float,
        one_at_a_time: bool = False,
        timed: bool = True,
    ) -> None:
        self._work, self._device, self._patience_s = work, device, patience_s
        self._one_at_a_time, self._timed = one_at_a_time, timed
        self._lanes = StreamLanes(device, patience_s=patience_s, one_at_a_time=one_at_a_time)
        self._streams = self._lanes.streams
        self._waits = BoundedWaits(device, self._streams, patience_s)
        self._flags: Flags | None = None
        self._thread = TransferThread(device.done, patience_s)
        self._recorded: RecordedStep | None = None
        self._step: SubmittedStep | None = None
        self._last: SubmittedStep | None = None
        self._timeline: Timeline | None = None
        self._warm = self._closed = self._lost = False

    def __enter__(self) -> CudaMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the transfer thread and drop what was recorded; a second call does nothing. The timeline stays."""
        if not self._closed:
            self._closed = True
            self._thread.close()
            with suppress(RuntimeError):  # of a device that was lost
                self._timeline = self.timeline
            # these know the machine: without them nobody keeps the KV cache alive
            self._recorded = self._last = None

    def dismiss(self) -> None:
        """Tell the transfer thread to end without waiting for it."""
        self._thread.dismiss()

    @property
    def timed(self) -> bool:
        """Whether each operation is timed."""
        return self._timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        self._timed, self._recorded = timed, None

    @property
    def replays(self) -> bool:
        """Whether a step has been recorded."""
        return self._recorded is not None

    @property
    def timeline(self) -> Timeline | None:
        """When the operations of the last step ran, worked out when first asked for."""
        step = self._last
        if step is not None and self._timeline is None:
            if self._times(step):
                self._timeline = timeline(
                    step.title,
                    step.marks,
                    step.host,
                    zero_s=step.zero_s,
                    since=lambda event: self._device.seconds(step.opened, event),
                    moved_bytes=self._work.moved_bytes,
                )
            else:
                seconds = self._device.seconds(step.opened, step.finished)
                self._timeline = whole_step(step.title, step.host, zero_s=step.zero_s, seconds=seconds)
        return self._timeline

    def _times(self, step: SubmittedStep) -> bool:
        """Whether each operation is timed."""
        return self._timed and (step.mode is not Mode.CAPTURE or self._device.times_graphs)

    def execute(
        self,
        step: Step,
        title: str = "step",
        *,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Drive one step to its end; `prepare` is the first thing on its main stream.

        A step that was recorded is replayed, and `step` is not asked, while the work's `key` is the same. Raises
        `EngineError` naming the operation that failed.
        """
        if self._closed:
            raise EngineError("the machine is closed: make a new one")
        if self._lost:
            raise EngineError("the device did not become idle after a step that failed: start a new process")
        self._timeline = self._last = None
        key = self._work.key()
        if self._recorded is not None and self._recorded.key == key:
            step.close()
            now = self._recorded.step
            now.ledger, now.host = self._ledger(), []
            self._step = now
            self._attempt(now, lambda: self._replay(now))
        else:
            self._recorded = None
            alone = self._one_at_a_time or not self._warm
            now = SubmittedStep(title, prepare, Mode.ALONE if alone else Mode.EAGER, self._ledger())
            self._step = now
            self._attempt(now, lambda: self._drive(step, key))
        self._warm = True
        self._last = now

    def _ledger(self) -> Ledger:
        return Ledger(self._publish, self._release)

    def _attempt(self, now: SubmittedStep, work: Callable[[], None]) -> None:
        try:
            now.zero_s = now.free_s = time.perf_counter()
            work()
            self._finish(now)
        except BaseException as error:
            self._abandon(now, error)
            raise explained(now.ledger.failure or error)  # noqa: B904
        finally:
            self._step = None

    def _drive(self, step: Step, key: Hashable) -> None:
        now, wait = self._now, None
        for wait in step:
            if now.capture is not None:
                self._end_capture(now, wait, key)
            elif now.mode is Mode.CAPTURE:
                raise EngineError("the launching thread waits once in a graph, at its end")
            else:
                self._block(now, wait)
        if wait is None:
            raise EngineError("a step that waits for nothing has no end")

    @property
    def _now(self) -> SubmittedStep:
        assert self._step is not None, "verbs belong to a step: call execute"
        return self._step

    # ---- the beginning of a step

    def begin_graph(self) -> None:
        """Record what follows; the first step only does it, one operation after another."""
        now = self._now
        now.in_graph = True
        if now.mode is Mode.EAGER:
            now.mode = Mode.CAPTURE
            self._begin()
            now.capture = ExitStack()
            now.graph = now.capture.enter_context(self._device.capture(self._streams[Lane.MAIN]))
            self._enter(now)

    def _begin(self) -> None:
        """The main stream comes after what the caller has submitted; with a timeline, after its end."""
        if self._flags is None:
            self._flags = self._device.flags()
        self._flags.begin()
        before = self._device.event(timed=False)
        caller = self._device.callers_stream()
        with self._device.on(caller):
            self._device.record(before, caller)
        if self._timed:
            self._waits.event(before, None, self._now.ledger)
        self._lanes.come_after(before)

    def _enter(self, now: SubmittedStep) -> None:
        flags = self._flags
        assert flags is not None

        def first() -> None:
            flags.advance()
            now.prepare()

        self._lanes.enter(now, first)

    def _open(self, now: SubmittedStep) -> None:
        if not now.is_open:
            self._begin()
            self._lanes.start_clock(now)
            self._enter(now)

    # ---- what a schedule submits

    def launch(self, lane: Lane, op: Op) -> Token:
        """Submit `op` on the stream of `lane`."""
        now = self._now
        self._open(now)
        token = self._on_stream(now, lane, op, lambda: self._work.run(op))
        if not now.in_graph:
            now.host_mark(submission(op))
        return token

    def _on_stream(self, now: SubmittedStep, lane: Lane, op: Op, do: Callable[[], None]) -> Token:
        token = self._lanes.put(now, lane, op, do, timed=self._times(now))
        if now.mode is Mode.ALONE:
            self._waits.event(now.marks[token].end, op, now.ledger)
        return token

    def wait(self, lane: Lane, token: Token, cause: Cause) -> None:
        """The next operation of `lane` starts after `token`."""
        self._now.pending.setdefault(lane, []).append(Waited(token, cause))

    def host_work(self, op: Op) -> Token:
        """Queue `op` for the transfer threads."""
        now = self._now
        self._open(now)
        token = self._by_threads(now, op, lambda: self._work.run(op))
        now.host_mark(runtime_op("thread_wake", op.layer))
        return token

    def ring(self, token: Token, layer: int) -> Token:
        """After `token` its stream sends what was chosen to the host and rings; the threads wait for that."""
        now, site = self._now, len(self._now.rung)
        if site >= FLAG_SITES:
            raise EngineError(f"a step rings more than {FLAG_SITES} doorbells")
        mark, flags = now.marks[token], self._flags
        assert flags is not None, "a doorbell comes after the operation that rings it"
        letter, stream = self._work.letter(mark.op), self._streams[mark.lane]
        with self._device.on(stream):
            attempt(mark.op, lambda: flags.ring(site, letter))
            rung = self._device.event(timed=False)
            self._device.record(rung, stream)
            if self._times(now):
                mark.rings = self._device.event(timed=True, recorded=now.mode is Mode.CAPTURE)
                self._device.record(mark.rings, stream)
        if now.mode is Mode.ALONE:
            self._waits.stream(mark.lane, mark.op, now.ledger)
        seen = self._by_threads(now, runtime_op("doorbell", layer), lambda: None, lambda: flags.rung(site))
        now.marks[seen].hears = token
        now.rung[seen] = site, mark.lane, rung
        return seen

    def flagged_work(self, seen: Token, op: Op) -> Token:
        """`op` on the transfer threads; they are in order, so after `seen`."""
        return self._by_threads(self._now, op, lambda: self._work.run(op))

    def flagged_copy(self, ready: Token, op: Op) -> Token:
        """The transfer threads submit `op` on the copy engine's stream, which is theirs alone."""
        now = self._now
        token, copied = now.mark(Lane.POOL, submission(op)), now.mark(Lane.H2D, op)
        submitted, copy = now.marks[token], now.marks[copied]
        submitted.submitted_s = copy.submitted_s = None
        copy.waits = (Waited(token, Cause.HOST_WORK),)
        timed = self._timed

        def submit() -> Event:
            stream = self._streams[Lane.H2D]
            with self._device.on(stream):
                copy.start = self._device.event(timed=timed)
                self._device.record(copy.start, stream)
                self._work.run(op)
                copy.end = self._device.event(timed=timed)
                self._device.record(copy.end, stream)
            return copy.end

        self._hand_over(now, Errand(op, (token, copied), submit), submitted)
        return copied

    def wait_flag(self, lane: Lane, seen: Token, done: Token, layer: int, cause: Cause) -> Token:
        """A kernel on `lane` polls the ready flag of the request `seen`, which is set once `done` is."""
        now, flags = self._now, self._flags
        assert flags is not None
        (site, _, _), place, op = now.rung[seen], len(now.polls), runtime_op("ready_flag", layer)
        if place >= FLAG_SITES:
            raise EngineError(f"a step waits for more than {FLAG_SITES} flags")
        now.polls.append((op, site))
        if now.mode is Mode.CAPTURE:
            now.answers.append((done, site))
        else:
            now.ledger.announce(done, site)
        self._after_bells(now, lane, seen)
        token = self._on_stream(now, lane, op, lambda: flags.wait(site, place, FLAG_PATIENCE * self._patience_s))
        now.marks[token].polls = Waited(done, cause)
        if not now.in_graph:
            now.host_mark(submission(op))
        return token

    def _after_bells(self, now: SubmittedStep, lane: Lane, seen: Token) -> None:
        """What is next on `lane` comes after every bell that the threads must hear before they answer `seen`.

        Streams may share a queue of the device: a poll that came first in it would keep the bell from ringing.
        """
        last = {stream: rung for token, (_, stream, rung) in now.rung.items() if token <= seen}
        with self._device.on(self._streams[lane]):
            self._lanes.join_in(now, lane)
            for stream, rung in last.items():
                if stream is not lane:
                    self._device.wait(self._streams[lane], rung)

    def _by_threads(
        self, now: SubmittedStep, op: Op, do: Callable[[], None], is_asked: Callable[[], bool] | None = None
    ) -> Token:
        token = now.mark(Lane.POOL, op)
        mark = now.marks[token]
        mark.late = Cause.HOST_WORK if is_asked is None else Cause.SYNC
        mark.submitted_s = None
        self._hand_over(now, Errand(op, (token,), do, is_asked), mark)
        return token

    def _hand_over(self, now: SubmittedStep, errand: Errand, mark: Mark) -> None:
        """To the transfer thread at once; a recorded errand with every replay; alone, waited for."""
        do = errand.do

        def timed() -> Event:
            mark.began_s = time.perf_counter()
            event = do()
            mark.ended_s = time.perf_counter()
            return event

        errand.do = timed
        if now.mode is Mode.CAPTURE:
            now.errands.append(errand)
            return
        self._thread.put(now.ledger, errand)
        if now.mode is Mode.ALONE:
            self._waits.threads(errand.tokens[-1], errand.op, now.ledger)

    # ---- waits of the launching thread

    def _block(self, now: SubmittedStep, wait: HostWait) -> None:
        began, mark = time.perf_counter(), now.marks[wait.token]
        if mark.order is None:
            self._waits.threads(wait.token, mark.op, now.ledger)
        else:
            letter = self._work.letter(mark.op) if wait.op.name == "read_back" else None
            event = mark.order
            if letter is not None:
                stream, event = self._streams[mark.lane], self._device.event(timed=False)
                with self._device.on(stream):
                    letter.bring()
                    self._device.record(event, stream)
            self._waits.event(event, mark.op, now.ledger)
        now.late = dict.fromkeys(Lane, wait.cause)
        now.free_s = time.perf_counter()
        now.host_mark(wait.op, ((wait.cause.value, now.free_s - began),))
        if now.ledger.failure is not None:
            raise now.ledger.failure

    # ---- graphs

    def _end_capture(self, now: SubmittedStep, wait: HostWait, key: Hashable) -> None:
        """Every lane comes back to the main stream; then the graph runs for the first time."""
        capture = now.capture
        assert capture is not None
        self._lanes.come_together(now)
        now.capture = None
        capture.close()
        self._recorded = RecordedStep(now.graph, now, wait, key)
        self._launch_graph(now)

    def _replay(self, now: SubmittedStep) -> None:
        self._begin()
        self._launch_graph(now)

    def _launch_graph(self, now: SubmittedStep) -> None:
        assert self._recorded is not None
        main, wait = self._streams[Lane.MAIN], self._recorded.wait
        for token, site in now.answers:
            now.ledger.announce(token, site)
        for errand in now.errands:
            self._thread.put(now.ledger, errand)
        self._lanes.start_clock(now)
        with self._device.on(main):
            self._device.replay(self._recorded.graph, main)
        self._lanes.stop_clock(now)
        for mark in now.marks:
            if mark.submitted_s is not None:
                mark.submitted_s = now.zero_s
        now.host_mark(runtime_op("graph_launch", 0))
        began = time.perf_counter()
        self._waits.event(now.finished, now.marks[wait.token].op, now.ledger)
        now.free_s = time.perf_counter()
        now.host_mark(wait.op, ((wait.cause.value, now.free_s - began),))

    # ---- the end of a step

    def _finish(self, now: SubmittedStep) -> None:
        """Every lane is idle, every flag was answered in time."""
        if now.mode is not Mode.CAPTURE and not self._timed:
            self._lanes.stop_clock(now)  # before the host's own waits are in it
        for token, mark in enumerate(now.marks):
            if mark.lane is Lane.POOL or mark.order is None:
                self._waits.threads(Token(token), mark.op, now.ledger)
        if now.mode is not Mode.CAPTURE:
            for lane in STREAMS:
                if lane in now.entered:
                    self._waits.stream(lane, now.marks[-1].op, now.ledger)
        if now.ledger.failure is not None:
            raise now.ledger.failure
        self._check_flags(now)

    def _check_flags(self, now: SubmittedStep) -> None:
        if now.polls and self._flags is not None and (late := self._flags.late(len(now.polls))) is not None:
            place, number, seen = late
            op, site = now.polls[place]
            raise FailedOperationError(
                op, EngineError(f"flag of request {site}: waited for number {number}, it stands at {seen}")
            )

    def _abandon(self, now: SubmittedStep, error: BaseException) -> None:
        """Nothing more is done, nobody waits; then host and device count from 0 again."""
        now.ledger.fail(error)
        if now.capture is not None:
            capture, now.capture = now.capture, None
            with suppress(BaseException):  # a capture that broke off may refuse to end: its graph is dropped
                capture.__exit__(type(error), error, error.__traceback__)
        self._recorded = None
        self._step = None
        try:
            for lane in STREAMS:
                self._waits.stream(lane, None, None)
            if self._flags is not None:
                self._flags.reset()
        except BaseException:
            self._lost = True

    def _publish(self, site: int) -> None:
        if self._flags is not None:
            self._flags.publish(site)

    def _release(self) -> None:
        if self._flags is not None:
            self._flags.release()
