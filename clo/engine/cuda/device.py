"""What the CUDA machine needs of a device: streams, events, recorded graphs, flags. And torch's implementation of it.

The protocols are small, so that a test can record what a step would do to a device. Knows nothing about schedules.
**Not yet run on a GPU.**
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch

from clo.engine.words import Words
from clo_kernels.ring_doorbell import ring_doorbell
from clo_kernels.wait_ready import wait_ready

Stream = Any
Event = Any
Graph = Any

FLAG_SITES = 4096
"""Requests and waits of a step, at most: two of each a layer are usual."""
CYCLES_PER_S = 2e9
"""Of a device's clock, about."""
LOOKS_PER_S = 1e6
"""Looks of a waiting kernel at a flag in host memory, about."""


class Flags(Protocol):
    """One doorbell and one ready flag for every request of a step (`site`), and the number of the step.

    A request rings with the number of its step and is answered with it. Nothing else is ever stored, so that a flag
    left from another step is never taken for this one's.
    """

    def begin(self) -> None:
        """The host counts a new step."""

    def advance(self) -> None:
        """The device counts a new step, on the current stream."""

    def ring(self, site: int, letter: Words | None) -> None:
        """Carry the letter to the host and ring, on the current stream."""

    def wait(self, site: int, place: int, patience_s: float) -> None:
        """The current stream waits until `site` is answered or patience ends; `place` numbers the waits of a step."""

    def rung(self, site: int) -> bool:
        """Whether the host sees the doorbell of this step."""

    def publish(self, site: int) -> None:
        """The host answers."""

    def release(self) -> None:
        """Answer everything: the step has failed, nobody is to wait."""

    def late(self, places: int) -> tuple[int, int, int] | None:
        """The first of so many waits that gave up: its place, the number waited for and the one seen."""

    def reset(self) -> None:
        """Count from 0 again, host and device; the device is idle."""


class DeviceApi(Protocol):
    """A device with streams. Calls that submit work act on the stream that `on` made current."""

    times_graphs: bool

    def stream(self, name: str) -> Stream:
        """The stream of this name, made when first asked for."""

    def callers_stream(self) -> Stream:
        """What is current where a step is asked for."""

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """Make it current."""

    def event(self, *, timed: bool, recorded: bool = False) -> Event:
        """A new event; `recorded`: inside a graph, to be read after each replay."""

    def delay(self, seconds: float) -> None:
        """Keep the current stream busy until what follows has been submitted: its time is then its own."""

    def record(self, event: Event, stream: Stream) -> None:
        """Mark a point of the stream."""

    def wait(self, stream: Stream, event: Event) -> None:
        """The stream goes on after the event."""

    def done(self, event: Event) -> bool:
        """Whether the event has happened."""

    def seconds(self, first: Event, second: Event) -> float:
        """Between two timed events that have happened."""

    def capture(self, stream: Stream) -> AbstractContextManager[Graph]:
        """What is submitted inside, by this thread, becomes a graph and does not run."""

    def replay(self, graph: Graph, stream: Stream) -> None:
        """Run a graph."""

    def flags(self) -> Flags:
        """Flags of their own."""


class TorchFlags:
    """Flag words in pinned memory, polled by the kernels `ring_doorbell` and `wait_ready`."""

    def __init__(self, device: torch.device) -> None:
        self._number = 0
        # not inference tensors, whoever asks for flags: those could not be reset outside of that mode
        with torch.inference_mode(False):
            self._doorbells, self._readies = (
                torch.zeros(FLAG_SITES, dtype=torch.int64, pin_memory=True) for _ in range(2)
            )
            # what the CPU polls and stores: a torch operation on one word takes a microsecond
            self._seen, self._answers = self._doorbells.numpy(), self._readies.numpy()
            self._sequences = torch.zeros(FLAG_SITES, dtype=torch.int64, device=device)
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
            self._reports = torch.zeros((FLAG_SITES, 3), dtype=torch.int64, device=device)
            message = torch.zeros(1, dtype=torch.int32, device=device)
            self._nothing = message, torch.zeros(1, dtype=torch.int32, pin_memory=True)
            self._warm_up(device)

    def _warm_up(self, device: torch.device) -> None:
        """A kernel that is loaded while another one spins may wait for it without end."""
        self.begin()
        self.advance()
        self.ring(0, None)
        self.publish(0)
        self.wait(0, 0, 1.0)
        torch.cuda.synchronize(device)
        self.reset()

    def begin(self) -> None:
        self._number += 1

    def advance(self) -> None:
        self._step += 1

    def ring(self, site: int, letter: Words | None) -> None:
        message, mailbox = self._nothing if letter is None else (letter.message, letter.mailbox)
        ring_doorbell(self._sequences[site : site + 1], message, mailbox, self._doorbells[site : site + 1])

    def wait(self, site: int, place: int, patience_s: float) -> None:
        looks = int(min(2**31 - 1, max(1.0, patience_s * LOOKS_PER_S)))
        wait_ready(self._step, self._readies[site : site + 1], self._reports[place], max_spins=looks)

    def rung(self, site: int) -> bool:
        return bool(self._seen[site] == self._number)

    def publish(self, site: int) -> None:
        self._answers[site] = self._number

    def release(self) -> None:
        self._answers[:] = self._number

    def late(self, places: int) -> tuple[int, int, int] | None:
        for place, (number, seen, _) in enumerate(self._reports[:places].tolist()):
            if seen != number:
                return place, number, seen
        return None

    def reset(self) -> None:
        self._number = 0
        for words in (self._doorbells, self._readies, self._sequences, self._step, self._reports):
            words.zero_()


class TorchDevice:
    """Streams, events and graphs of `torch.cuda`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        try:
            torch.cuda.Event(enable_timing=True, external=True)
            self.times_graphs = True
        except TypeError:  # older versions cannot record times inside a graph
            self.times_graphs = False

    def stream(self, name: str) -> Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self._device)
        return self._streams[name]

    def callers_stream(self) -> Stream:
        return torch.cuda.current_stream(self._device)

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def event(self, *, timed: bool, recorded: bool = False) -> Event:
        if recorded:
            return torch.cuda.Event(enable_timing=timed, external=True)
        return torch.cuda.Event(enable_timing=timed)

    def delay(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_S))

    def record(self, event: Event, stream: Stream) -> None:
        event.record(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def done(self, event: Event) -> bool:
        return bool(event.query())

    def seconds(self, first: Event, second: Event) -> float:
        return float(first.elapsed_time(second)) / 1e3

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[Graph]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # other threads go on using the device meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                yield graph
        finally:
            # a capture that cannot be ended leaves its own stream current
            torch.cuda.set_stream(before)

    def replay(self, graph: Graph, stream: Stream) -> None:
        with self.on(stream):
            graph.replay()

    def flags(self) -> Flags:
        return TorchFlags(self._device)


@lru_cache(maxsize=8)
def torch_device(device: torch.device) -> TorchDevice:
    """One for all machines of a device: the allocator keeps memory by stream, so that streams are used again."""
    return TorchDevice(device)
