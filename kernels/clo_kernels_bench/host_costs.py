"""What the CPU pays: launches, graph replays, events, synchronisation, a small read-back, a flag's round trip."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import torch

from clo_kernels.hit_test import hit_test
from clo_kernels.recorded_calls import Call, recorded
from clo_kernels.ring_doorbell import ring_doorbell
from clo_kernels.wait_ready import raise_if_late, wait_ready
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Figure, scaled
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.timing import event_samples, host_samples

NODES = 200
POLLS = 1000


def host_figures(device: torch.device, *, quick: bool) -> Iterator[Figure]:
    """Times of the calling thread, but for `graph node`, which is the device's from one tiny kernel to the next."""
    repeats = 10 if quick else 30
    word = torch.ones(1, device=device)
    stream, synchronize = torch.cuda.current_stream(), torch.cuda.synchronize
    tiny = recorded([lambda: word.add_(1)] * NODES)
    event = torch.cuda.Event()
    sizes = Sizes(device=device)
    query, anchor = problems.random_query(sizes), problems.random_query(sizes)
    tau, missed = torch.zeros(sizes.kv_heads, device=device), problems.everyone(sizes)
    kernel_calls = {
        "torch kernel": lambda: word.add_(1),
        "wrapper (hit_test)": lambda: hit_test(query, anchor, tau, out=missed),
    }
    for name, call in kernel_calls.items():
        samples = host_samples(call, calls=50, repeats=repeats, after=synchronize)
        yield Figure(operation="launch", case={"what": name}, samples_us=samples)
    nodes = scaled(event_samples(tiny.replay, repeats=repeats), NODES)
    yield Figure(operation="graph node", case={"nodes": NODES}, samples_us=nodes)
    samples = host_samples(tiny.replay, calls=1, repeats=repeats, after=synchronize)
    yield Figure(operation="graph replay", case={"nodes": NODES}, samples_us=samples)
    samples = host_samples(lambda: event.record(), calls=50, repeats=repeats, after=synchronize)
    yield Figure(operation="event record", case={}, samples_us=samples)
    samples = host_samples(lambda: stream.wait_event(event), calls=50, repeats=repeats, after=synchronize)
    yield Figure(operation="stream waits for event", case={}, samples_us=samples)
    samples = host_samples(stream.synchronize, calls=20, repeats=repeats)
    yield Figure(operation="stream synchronize", case={"stream": "idle"}, samples_us=samples)

    def launch_and_wait() -> None:
        word.add_(1)
        stream.synchronize()

    yield Figure(
        operation="launch and synchronize", case={}, samples_us=host_samples(launch_and_wait, calls=20, repeats=repeats)
    )
    yield from _read_backs(device, repeats)


def _read_backs(device: torch.device, repeats: int) -> Iterator[Figure]:
    for num_bytes in (4, 4096):
        there = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
        here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

        def read(there: torch.Tensor = there, here: torch.Tensor = here) -> None:
            here.copy_(there, non_blocking=True)
            torch.cuda.current_stream().synchronize()

        samples = host_samples(read, calls=20, repeats=repeats)
        yield Figure(operation="read back", case={"bytes": num_bytes}, samples_us=samples, num_bytes=float(num_bytes))


def flag_figures(device: torch.device, *, quick: bool) -> Iterator[Figure]:
    """Doorbell to a polling thread and ready flag back, in a replayed graph: what one flagged transfer costs at least.

    The thread polls from Python; how often is a figure of its own.
    """
    doorbell, ready = (torch.zeros(1, dtype=torch.int64, pin_memory=True) for _ in range(2))
    for words in (0,) if quick else (0, 8192):
        sequence = doorbell.to(device)
        message = torch.randint(0, 99, (words,), dtype=torch.int32, device=device)
        mailbox = torch.empty(words, dtype=torch.int32, pin_memory=True)
        report = torch.zeros(3, dtype=torch.int64, device=device)

        def trip(
            sequence: torch.Tensor = sequence,
            message: torch.Tensor = message,
            mailbox: torch.Tensor = mailbox,
            report: torch.Tensor = report,
        ) -> None:
            ring_doorbell(sequence, message, mailbox, doorbell)
            wait_ready(sequence, ready, report)

        with _Echo(doorbell, ready) as echo:
            graph = recorded([trip])
            samples = _queued_samples(graph.replay, echo, repeats=20 if quick else 100)
        raise_if_late("ready flag", report)
        yield Figure(operation="ring_doorbell + wait_ready", case={"message_words": words}, samples_us=samples)
    yield Figure(operation="poll of a Python thread", case={}, samples_us=(echo.poll_us,))


def _queued_samples(trip: Call, echo: _Echo, *, repeats: int) -> tuple[float, ...]:
    """All trips are queued before any is answered: the thread that answers would hold up the one that launches."""
    echo.answering.clear()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        trip()
        end.record()
    echo.answering.set()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) * 1e3 for start, end in pairs[1:])


class _Echo:
    """A CPU thread that answers every doorbell with its number while `answering` is set, until it is left."""

    def __init__(self, doorbell: torch.Tensor, ready: torch.Tensor) -> None:
        self._doorbell, self._ready, self._leave = doorbell.numpy(), ready.numpy(), False
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self.answering = threading.Event()
        self.answering.set()
        self.poll_us = float("nan")

    def __enter__(self) -> _Echo:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave = True
        self.answering.set()
        self._thread.join(timeout=10)

    def _answer(self) -> None:
        while not self._leave:
            self.answering.wait()
            begun = time.perf_counter()
            for _ in range(POLLS):
                number = self._doorbell[0]
                if number != self._ready[0]:
                    self._ready[0] = number
            self.poll_us = (time.perf_counter() - begun) / POLLS * 1e6
