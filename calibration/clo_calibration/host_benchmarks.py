"""What the host's part of offloading costs by itself: copies, scattered reads, threads that wake each other.

Each returns raw samples; knows nothing about models or schedules.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from clo.engine.cpu_machine import CpuMachine, Flag
from clo.schedule import Cause, HostWait, Lane, Step
from clo.schedule.graph import runtime_op
from clo.schedule.machine import Op

ARENA_BYTES = 64 * 2**20
"""Larger than the caches of most processors."""

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Seconds of each repetition; `amount` is in `unit`, so that `amount / seconds` is a rate."""

    name: str
    parameters: dict[str, float]
    unit: str
    amount: float
    seconds: tuple[float, ...]


def host_benchmarks(threads: tuple[int, ...], repetitions: int = 15) -> list[Benchmark]:
    """Copies, scattered reads by thread count and page size, staging, launches, wake-ups and flags."""
    found = [_copy(repetitions), _matmul(repetitions), *thread_benchmarks(threads, repetitions)]
    return [*found, _flag(repetitions), _launches(repetitions)]


def thread_benchmarks(threads: tuple[int, ...], repetitions: int = 15) -> list[Benchmark]:
    """What the host's threads cost beside any device."""
    found = []
    for page_bytes in (4096, 8192, 16384, 65536):
        found += [_gather(page_bytes, count, repetitions) for count in threads]
        found.append(_staging(page_bytes, repetitions))
    return [*found, _wake(repetitions)]


def _timed(work: Callable[[], object], repetitions: int) -> tuple[float, ...]:
    seconds = []
    for repetition in range(WARM_UP + repetitions):
        began = time.perf_counter()
        work()
        if repetition >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    return tuple(seconds)


def _copy(repetitions: int) -> Benchmark:
    source, target = (torch.ones(ARENA_BYTES, dtype=torch.uint8) for _ in range(2))
    seconds = _timed(lambda: target.copy_(source), repetitions)
    return Benchmark("copy", {}, "bytes", ARENA_BYTES, seconds)


def _matmul(repetitions: int, size: int = 512) -> Benchmark:
    left, right = torch.ones((size, size)), torch.ones((size, size))
    return Benchmark("matmul", {}, "FLOP", 2.0 * size**3, _timed(lambda: left @ right, repetitions))


def _pages(page_bytes: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    arena = torch.ones((ARENA_BYTES // page_bytes, page_bytes), dtype=torch.uint8)
    order = torch.randperm(len(arena), generator=torch.Generator().manual_seed(0))[: len(arena) // 4].tolist()
    return arena, torch.empty((len(order), page_bytes), dtype=torch.uint8), order


def _gather(page_bytes: int, threads: int, repetitions: int) -> Benchmark:
    """Threads read scattered pages, one copy each, into a contiguous buffer."""
    arena, target, order = _pages(page_bytes)

    def collect(part: int) -> None:
        for at in range(part, len(order), threads):
            target[at] = arena[order[at]]

    with ThreadPoolExecutor(threads) as pool:
        seconds = _timed(lambda: list(pool.map(collect, range(threads))), repetitions)
    parameters = {"page_bytes": float(page_bytes), "threads": float(threads)}
    return Benchmark("scattered pages", parameters, "bytes", float(len(order) * page_bytes), seconds)


def _staging(page_bytes: int, repetitions: int) -> Benchmark:
    """The same in one call, and then on to where it is used."""
    arena, target, order = _pages(page_bytes)
    index, device = torch.tensor(order), torch.empty_like(target)

    def stage() -> None:
        torch.index_select(arena, 0, index, out=target)
        device.copy_(target)

    seconds = _timed(stage, repetitions)
    return Benchmark("staging", {"page_bytes": float(page_bytes)}, "bytes", float(target.numel()), seconds)


def _wake(repetitions: int) -> Benchmark:
    """A sleeping thread gets something to do; half of a round trip."""
    asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    answered: queue.SimpleQueue[int] = queue.SimpleQueue()

    def serve() -> None:
        while asked.get() is not None:
            answered.put(0)

    def round_trips() -> None:
        for _ in range(50):
            asked.put(0)
            answered.get()

    return _with_thread(serve, round_trips, lambda: asked.put(None), "thread wake-up", 100, repetitions)


def _flag(repetitions: int) -> Benchmark:
    """A number published to a thread that waits for it, and back; half of a round trip."""
    there, back, stop = Flag("there"), Flag("back"), threading.Event()

    def serve() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            there.wait(number, 10.0)
            back.publish(number)

    def round_trips() -> None:
        for _ in range(50):
            number = there.number + 1
            there.publish(number)
            back.wait(number, 10.0)

    def end() -> None:
        stop.set()
        there.publish(there.number + 1)

    return _with_thread(serve, round_trips, end, "flag", 100, repetitions)


def _with_thread(
    serve: Callable[[], None],
    round_trips: Callable[[], None],
    end: Callable[[], None],
    name: str,
    count: int,
    repetitions: int,
) -> Benchmark:
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    seconds = _timed(round_trips, repetitions)
    end()
    thread.join(10.0)
    return Benchmark(name, {}, "times", float(count), seconds)


def _launches(repetitions: int, count: int = 200) -> Benchmark:
    """Operations that do nothing, from their submission to the end of the last."""

    def step(machine: CpuMachine, nothing: Op) -> Step:
        for _ in range(count):
            last = machine.launch(Lane.MAIN, nothing)
        yield HostWait(last, nothing, Cause.SYNC)

    with CpuMachine(lambda _: 0.0) as machine:
        nothing = runtime_op("kernel_launch", 0)
        seconds = _timed(lambda: machine.execute(step(machine, nothing)), repetitions)
    return Benchmark("launch", {}, "times", float(count), seconds)
