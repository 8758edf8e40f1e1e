"""A device that is a thread: streams in order, whatever else in an order drawn by lot, graphs as CUDA records them.

What CUDA refuses it refuses: work on a stream that has not joined the recording, a graph whose lanes do not come
back, a recorded wait for what is outside. Kernels are named; `ran` says in which order they ended.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from clo.schedule import Op

Ready = Callable[[], bool]


@dataclass(eq=False)
class FakeEvent:
    timed: bool
    external: bool
    time: float | None = None
    pending: int = 0
    nodes: frozenset[FakeNode] | None = None


@dataclass(eq=False)
class FakeNode:
    do: Callable[[], None]
    after: frozenset[FakeNode]
    ready: Ready = lambda: True


@dataclass(eq=False)
class FakeGraph:
    nodes: list[FakeNode] = field(default_factory=list)


@dataclass(eq=False)
class FakeStream:
    name: str
    queue: list[tuple[Ready, Callable[[], None]]] = field(default_factory=list)


class FakeDevice:
    """Implements `DeviceApi`; close it. `ran` has (stream, name, layer) of every operation that ended.

    `one_queue`: what begins in a graph, a poll too, keeps the rest of it waiting until it has ended.
    """

    def __init__(self, seed: int = 0, *, times_graphs: bool = True, one_queue: bool = False) -> None:
        self.times_graphs, self.one_queue = times_graphs, one_queue
        self.ran: list[tuple[str, str, int]] = []
        self.polled: list[FakeEvent] = []
        self.captures = self.replays = 0
        self.deaf: set[int] = set()
        self._chance, self._local = random.Random(seed), threading.local()
        self._lock = threading.RLock()
        self._streams: dict[str, FakeStream] = {"caller": FakeStream("caller")}
        self._recording: FakeGraph | None = None
        self._tails: dict[FakeStream, frozenset[FakeNode]] = {}
        self._open = True
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._open = False
        self._thread.join(5)

    def _work(self) -> None:
        while self._open:
            with self._lock:
                heads = [stream for stream in self._streams.values() if stream.queue and stream.queue[0][0]()]
                if heads:
                    _, do = self._chance.choice(heads).queue.pop(0)
                    do()
            if not heads or self._chance.random() < 0.02:
                time.sleep(1e-5)

    # ---- DeviceApi

    def stream(self, name: str) -> FakeStream:
        return self._streams.setdefault(name, FakeStream(name))

    def callers_stream(self) -> FakeStream:
        return self._streams["caller"]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before = self.current
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    @property
    def current(self) -> FakeStream | None:
        found: FakeStream | None = getattr(self._local, "stream", None)
        return found

    def event(self, *, timed: bool, recorded: bool = False) -> FakeEvent:
        return FakeEvent(timed, recorded)

    def delay(self, seconds: float) -> None:
        self.submit(lambda: None)

    def record(self, event: FakeEvent, stream: FakeStream) -> None:
        assert self.current is stream
        with self._lock:
            if self._recording is not None and event.external:
                self.submit(lambda: setattr(event, "time", time.perf_counter()))
            elif self._recording is not None:
                assert not event.timed, "an event of the graph itself has no time"
                event.nodes = self._tails[stream]
            else:
                event.pending += 1
                event.nodes = None
                stream.queue.append((lambda: True, lambda: self._happened(event)))

    @staticmethod
    def _happened(event: FakeEvent) -> None:
        event.pending -= 1
        event.time = time.perf_counter()

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        with self._lock:
            if self._recording is not None:
                assert event.nodes is not None, "a graph cannot wait for what is outside"
                self._tails[stream] = self._tails.get(stream, frozenset()) | event.nodes
            else:
                assert event.nodes is None, "an event of a graph means nothing outside"
                stream.queue.append((lambda: event.pending == 0, lambda: None))

    def done(self, event: FakeEvent) -> bool:
        assert self._recording is None, "the host waits while a graph is recorded"
        with self._lock:
            if threading.current_thread() is threading.main_thread() and event not in self.polled:
                self.polled.append(event)
            return event.pending == 0

    def seconds(self, first: FakeEvent, second: FakeEvent) -> float:
        assert first.timed
        assert second.timed
        assert first.time is not None
        assert second.time is not None
        return second.time - first.time

    @contextmanager
    def capture(self, stream: FakeStream) -> Iterator[FakeGraph]:
        root = FakeNode(lambda: None, frozenset())
        graph = self._recording = FakeGraph([root])
        self._tails = {stream: frozenset([root])}
        try:
            with self.on(stream):
                yield graph
        finally:
            self._recording = None
        reached, border = set[FakeNode](), list(self._tails[stream])
        while border:
            node = border.pop()
            if node not in reached:
                reached.add(node)
                border += node.after
        assert reached == set(graph.nodes), "lanes that left the main stream did not come back"
        self._tails = {}
        self.captures += 1

    def replay(self, graph: FakeGraph, stream: FakeStream) -> None:
        self.replays += 1
        left, begun = set(graph.nodes), list[FakeNode]()

        def advance() -> bool:
            if not (begun and self.one_queue):
                free = [node for node in graph.nodes if node in left and not node.after & left]
                begun[:] = [self._chance.choice(free)] if free and self.one_queue else free
            if ready := [node for node in begun if node.ready()]:
                node = self._chance.choice(ready)
                begun.remove(node)
                left.discard(node)
                node.do()
            return not left

        with self._lock:
            stream.queue.append((advance, lambda: None))

    def flags(self) -> FakeFlags:
        return FakeFlags(self)

    # ---- what kernels are

    def submit(self, do: Callable[[], None], ready: Ready = lambda: True) -> None:
        """A kernel on the current stream."""
        stream = self.current
        assert stream is not None
        with self._lock:
            if self._recording is None:
                stream.queue.append((ready, do))
                return
            assert stream in self._tails, f"{stream.name} has not joined the recording"
            node = FakeNode(do, self._tails[stream], ready)
            self._recording.nodes.append(node)
            self._tails[stream] = frozenset([node])


class FakeFlags:
    """Implements `Flags`; sites in `device.deaf` are never answered."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        self._number = self._step = 0
        self._rings: dict[int, int] = {}
        self._doorbells: dict[int, int] = {}
        self._readies: dict[int, int] = {}
        self._late: dict[int, tuple[int, int]] = {}
        self._all = 0

    def begin(self) -> None:
        self._number += 1

    def advance(self) -> None:
        def count() -> None:
            self._step += 1

        self._device.submit(count)

    def ring(self, site: int, letter: Any) -> None:
        def ring() -> None:
            self._rings[site] = self._doorbells[site] = self._rings.get(site, 0) + 1
            if letter is not None:
                letter.has_come = True

        self._device.submit(ring)

    def wait(self, site: int, place: int, patience_s: float) -> None:
        began: list[float] = []

        def ready() -> bool:
            began.append(time.perf_counter()) if not began else None
            return self._seen(site) == self._step or time.perf_counter() - began[0] > patience_s

        def note() -> None:
            began.clear()
            self._late[place] = self._step, self._seen(site)

        self._device.submit(note, ready)

    def _seen(self, site: int) -> int:
        return max(self._readies.get(site, 0), self._all)

    def rung(self, site: int) -> bool:
        return self._doorbells.get(site) == self._number

    def publish(self, site: int) -> None:
        if site not in self._device.deaf:
            self._readies[site] = self._number

    def release(self) -> None:
        self._all = self._number

    def late(self, places: int) -> tuple[int, int, int] | None:
        for place in range(places):
            number, seen = self._late[place]
            if number != seen:
                return place, number, seen
        return None


@dataclass(eq=False)
class FakeLetter:
    """Stands for a page list on its way to the host."""

    device: FakeDevice
    has_come: bool = False

    def bring(self) -> None:
        self.device.submit(lambda: setattr(self, "has_come", True))


class FakeWork:
    """Operations that note that they ran: on a stream when their turn comes, on a thread at once."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.version = device, 0
        self.faults: dict[tuple[str, int], Callable[[], None]] = {}
        self.letters: dict[tuple[bool, int], FakeLetter] = {}

    def run(self, op: Op) -> None:
        with suppress(KeyError):
            self.faults[op.name, op.layer]()
        self._check_letter(op)
        stream = self.device.current
        place = ("threads" if stream is None else stream.name, op.name, op.layer)
        if stream is None:
            self.device.ran.append(place)
        else:
            self.device.submit(lambda: self.device.ran.append(place))

    def moved_bytes(self, op: Op) -> float:
        return 0.0

    def letter(self, op: Op) -> Any:
        if "select" not in op.name and "resolve" not in op.name:
            return None
        return self.letters.setdefault(_stage(op), FakeLetter(self.device))

    def begin(self) -> None:
        """A new step: what came before is old."""
        for letter in self.letters.values():
            letter.has_come = False

    def _check_letter(self, op: Op) -> None:
        """Who reads a page list on the host must have this step's."""
        if op.name.removeprefix("prefetch.") in ("lru_update", "host_gather", "bar_write", "copy_pages"):
            letter = self.letters.get(_stage(op))
            assert letter is None or letter.has_come, (
                f"{op.name} of layer {op.layer} reads a page list that is not there"
            )

    def key(self) -> int:
        return self.version


def _stage(op: Op) -> tuple[bool, int]:
    return op.name.startswith("prefetch."), op.layer
