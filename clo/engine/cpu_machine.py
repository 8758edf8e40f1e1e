"""The abstract machine on a CPU: every lane is a thread, the link is a memcpy, and they really overlap.

Knows the verbs of a schedule and when what they submitted ran; nothing about tensors.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from clo.engine.faults import FailedOperationError, explained
from clo.errors import EngineError
from clo.schedule import Cause, HostWait, Lane, Op, Step, Token
from clo.schedule.graph import runtime_op, submission
from clo.timeline import Span, Timeline

DEFAULT_PATIENCE_S = 60.0
"""Nothing in a step takes as long: a wait beyond it has failed."""

Run = Callable[[Op], float]
"""Does an operation and returns the bytes it moved over the host link."""


class Flag:
    """A number that one side publishes and the other polls; it only grows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self._changed = threading.Condition()

    def publish(self, number: int) -> None:
        """The number is now at least this."""
        with self._changed:
            self.number = max(self.number, number)
            self._changed.notify_all()

    def wait(self, number: int, patience_s: float) -> None:
        """Until the flag has reached `number`. Raises `EngineError` with both numbers if it does not in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.number >= number, patience_s):
                raise EngineError(
                    f"flag {self.name}: waited {patience_s:g} s for number {number}, it stands at {self.number}"
                )


class _Wait(NamedTuple):
    token: Token
    cause: Cause


class _Poll(NamedTuple):
    """An operation begins when `flag` shows `number`."""

    flag: Flag
    number: int
    cause: Cause


class _Task(NamedTuple):
    token: Token
    op: Op
    waits: tuple[_Wait, ...]
    run: Run
    poll: _Poll | None
    late: Cause
    """What its lane waited for if it had nothing to do until this was submitted."""


@dataclass(slots=True)
class _Submitted:
    """Everything of one step."""

    done: list[threading.Event] = field(default_factory=list)
    lane_of: list[Lane] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    pending: dict[Lane, list[_Wait]] = field(default_factory=dict)
    graph: list[tuple[Lane, _Task]] | None = None
    late: dict[Lane, Cause] = field(default_factory=dict)
    failure: BaseException | None = None
    began_s: float = 0.0
    host_free_s: float = 0.0
    rung: dict[Token, tuple[Lane, int]] = field(default_factory=dict)
    announced: dict[Token, list[tuple[Flag, int]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def announce(self, token: Token, flag: Flag, number: int) -> None:
        """Publish `number` once `token` is done."""
        with self.lock:
            if not self.done[token].is_set():
                self.announced.setdefault(token, []).append((flag, number))
                return
        flag.publish(number)

    def finish(self, token: Token) -> None:
        """`token` is done: those who sleep and those who poll may go on."""
        with self.lock:
            self.done[token].set()
            announced = self.announced.pop(token, [])
        for flag, number in announced:
            flag.publish(number)


class CpuMachine:
    """Runs steps of a schedule on lanes that are threads. Close it, or use it in a `with` block.

    `run` does an operation. After a step has failed the lanes are idle again and the next step may begin. With
    `one_at_a_time` the launching thread does every operation itself, so that each is timed alone.
    """

    def __init__(self, run: Run, *, patience_s: float = DEFAULT_PATIENCE_S, one_at_a_time: bool = False) -> None:
        self._run, self._patience_s, self._one_at_a_time = run, patience_s, one_at_a_time
        self._step = _Submitted()
        self.timeline: Timeline | None = None
        # a pair of flags for each stream: numbers of two streams may come in another order than they were given out
        self._doorbells = {lane: Flag(f"doorbell of the {lane}") for lane in Lane}
        self._readies = {lane: Flag(f"ready flag of the {lane}") for lane in Lane}
        self._rung = dict.fromkeys(Lane, 0)
        self._queues: dict[Lane, queue.SimpleQueue[tuple[_Submitted, _Task] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._closed = False
        for lane in Lane:
            if lane is not Lane.LAUNCH:
                self._start(lane)

    def _start(self, lane: Lane) -> None:
        self._queues[lane] = queue.SimpleQueue()
        thread = threading.Thread(target=self._serve, args=(lane,), name=f"clo {lane}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> CpuMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the lanes; a second call does nothing."""
        self.dismiss()
        for thread in self._threads:
            thread.join(self._patience_s)

    def dismiss(self) -> None:
        """Tell the lanes to end without waiting for them."""
        if not self._closed:
            self._closed = True
            for lane_queue in self._queues.values():
                lane_queue.put(None)

    def execute(self, step: Step, title: str = "step", *, prepare: Callable[[], None] = lambda: None) -> Timeline:
        """Drive one step to its end, after `prepare`. Raises `EngineError` naming the operation that failed."""
        if self._closed:
            raise EngineError("the machine is closed: make a new one")
        prepare()
        now = self._step
        now.began_s = now.host_free_s = time.perf_counter()
        try:
            for wait in step:
                self._block(wait)
            self._flush()
            self._drain()
        except BaseException as error:
            self._abandon(error)
            raise
        finally:
            self._step = _Submitted()
        if now.failure is not None:
            raise explained(now.failure)
        lanes = {span.lane for span in now.spans}
        ordered = tuple(sorted(now.spans, key=lambda span: span.start_s))
        used = tuple(lane.value for lane in Lane if lane.value in lanes)
        self.timeline = Timeline(title=title, spans=ordered, lanes=used)
        return self.timeline

    def _abandon(self, error: BaseException) -> None:
        """Let the lanes run empty without doing anything more."""
        self._step.failure = self._step.failure or error
        for lane, number in self._rung.items():
            self._doorbells[lane].publish(number)
            self._readies[lane].publish(number)
        self._flush()
        self._drain()

    def begin_graph(self) -> None:
        """Collect what is submitted; it goes to the lanes at once when the host next waits."""
        self._step.graph = None if self._one_at_a_time else []

    def launch(self, lane: Lane, op: Op) -> Token:
        """Queue `op` on `lane`."""
        return self._launched(self._queue(lane, op, self._run), op)

    def _launched(self, token: Token, op: Op) -> Token:
        """Outside a graph the launching thread pays for every operation."""
        if self._step.graph is None:
            self._host_span(submission(op))
        return token

    def wait(self, lane: Lane, token: Token, cause: Cause) -> None:
        """The next operation of `lane` starts after `token`."""
        self._step.pending.setdefault(lane, []).append(_Wait(token, cause))

    def host_work(self, op: Op) -> Token:
        """Queue `op` for the transfer threads."""
        token = self._queue(Lane.POOL, op, self._run)
        self._host_span(runtime_op("thread_wake", op.layer))
        return token

    def ring(self, token: Token, layer: int) -> Token:
        """When `token` is done the doorbell shows the next number; the transfer threads wait for that."""
        lane = self._step.lane_of[token]
        self._rung[lane] += 1
        doorbell, number = self._doorbells[lane], self._rung[lane]
        self._step.announce(token, doorbell, number)
        seen = self._queue(Lane.POOL, runtime_op("doorbell", layer), _nothing, _Poll(doorbell, number, Cause.SYNC))
        self._step.rung[seen] = lane, number
        return seen

    def flagged_work(self, seen: Token, op: Op) -> Token:
        """`op` on the transfer threads after `seen`."""
        self.wait(Lane.POOL, seen, Cause.HOST_WORK)
        return self._queue(Lane.POOL, op, self._run)

    def flagged_copy(self, ready: Token, op: Op) -> Token:
        """The transfer threads hand `op` to the copy engine after `ready`."""
        self.wait(Lane.POOL, ready, Cause.HOST_WORK)
        submitted = self._queue(Lane.POOL, submission(op), _nothing)
        self.wait(Lane.H2D, submitted, Cause.HOST_WORK)
        return self._queue(Lane.H2D, op, self._run)

    def wait_flag(self, lane: Lane, seen: Token, done: Token, layer: int, cause: Cause) -> Token:
        """`lane` polls the ready flag of the stream that rang, which shows the request's number once `done` is."""
        stream, number = self._step.rung[seen]
        ready = self._readies[stream]
        self._step.announce(done, ready, number)
        polls = runtime_op("ready_flag", layer)
        return self._launched(self._queue(lane, polls, _nothing, _Poll(ready, number, cause)), polls)

    def _queue(self, lane: Lane, op: Op, run: Run, poll: _Poll | None = None) -> Token:
        step = self._step
        token = Token(len(step.done))
        step.done.append(threading.Event())
        step.lane_of.append(lane)
        # what is launched first on a lane after the launching thread was blocked came late because of that
        late = step.late.pop(lane, Cause.LAUNCH)
        task = _Task(token, op, tuple(step.pending.pop(lane, ())), run, poll, late)
        if self._one_at_a_time:
            step.host_free_s = self._run_task(step, lane, task, _Waited(step.host_free_s))
        elif step.graph is None:
            self._queues[lane].put((step, task))
        else:
            step.graph.append((lane, task))
        return token

    def _flush(self) -> None:
        """Submit a collected graph."""
        step = self._step
        if step.graph:
            for lane, task in step.graph:
                self._queues[lane].put((step, task))
            self._host_span(runtime_op("graph_launch", 0))
        if step.graph is not None:
            step.graph = []

    def _block(self, wait: HostWait) -> None:
        """The launching thread sleeps until the token is done."""
        self._flush()
        began = time.perf_counter()
        self._await(wait.token)
        self._step.late = dict.fromkeys(Lane, wait.cause)
        self._step.host_free_s = time.perf_counter()
        self._host_span(wait.op, ((wait.cause.value, self._step.host_free_s - began),))
        if self._step.failure is not None:
            raise explained(self._step.failure)

    def _await(self, token: Token) -> None:
        if not self._step.done[token].wait(self._patience_s):
            raise EngineError(f"operation {token} of the step was not done in {self._patience_s:g} s")

    def _drain(self) -> None:
        deadline = time.perf_counter() + 2 * self._patience_s
        for done in self._step.done:
            done.wait(max(0.0, deadline - time.perf_counter()))

    def _host_span(self, op: Op, waits: tuple[tuple[str, float], ...] = ()) -> None:
        """The launching thread works without pause but where it waits: a span begins where the last one ended."""
        step, ended = self._step, time.perf_counter()
        self._record(step, Lane.LAUNCH, op, step.host_free_s, ended, 0.0, waits)
        step.host_free_s = ended

    @staticmethod
    def _record(
        step: _Submitted,
        lane: Lane,
        op: Op,
        began: float,
        ended: float,
        num_bytes: float,
        waits: tuple[tuple[str, float], ...],
    ) -> None:
        step.spans.append(
            Span(
                lane=lane.value,
                name=op.name,
                layer=op.layer,
                part=op.part.value,
                start_s=began - step.began_s,
                end_s=ended - step.began_s,
                num_bytes=num_bytes,
                waits=waits,
            )
        )

    def _serve(self, lane: Lane) -> None:
        """An operation's span begins where the lane's last one ended, unless the lane waited: its overhead counts."""
        lane_queue = self._queues[lane]
        free = time.perf_counter()
        while True:
            was_empty = lane_queue.empty()
            item = lane_queue.get()
            if item is None:
                return
            step, task = item
            # a lane that was idle before the step began waited for nothing
            free = max(free, step.began_s)
            waited = _Waited(free)
            if was_empty:
                waited.until_now(task.late)
            free = self._run_task(step, lane, task, waited)

    def _run_task(self, step: _Submitted, lane: Lane, task: _Task, waited: _Waited) -> float:
        """When the task ended, well or not; a step that has failed does nothing more."""
        try:
            return self._do(step, lane, task, waited) if step.failure is None else waited.free_s
        except BaseException as error:
            step.failure = step.failure or FailedOperationError(task.op, error)
            return waited.free_s
        finally:
            step.finish(task.token)

    def _do(self, step: _Submitted, lane: Lane, task: _Task, waited: _Waited) -> float:
        """When the operation ended."""
        for token, cause in task.waits:
            if not step.done[token].is_set():
                if not step.done[token].wait(self._patience_s):
                    raise EngineError(f"waited {self._patience_s:g} s for operation {token} ({cause.value})")
                waited.until_now(cause)
        if task.poll is not None:
            task.poll.flag.wait(task.poll.number, self._patience_s)
            waited.until_now(task.poll.cause)
        if step.failure is not None:
            return waited.free_s
        num_bytes = task.run(task.op)
        ended = time.perf_counter()
        self._record(step, lane, task.op, waited.free_s, ended, num_bytes, tuple(waited.causes))
        return ended


@dataclass(slots=True)
class _Waited:
    """What a lane stood still for, one cause after the other; `free_s` is when the last of them let it go on."""

    free_s: float
    causes: list[tuple[str, float]] = field(default_factory=list)

    def until_now(self, cause: Cause) -> None:
        now = time.perf_counter()
        self.causes.append((cause.value, now - self.free_s))
        self.free_s = now


def _nothing(_: Op) -> float:
    return 0.0
