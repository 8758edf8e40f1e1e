"""What a CUDA device's part of offloading costs by itself: copies, zero-copy, launches, graphs, flags, and attention
beside transfers.

Each returns raw samples, as `host_benchmarks` does; knows nothing about models or schedules. **Not yet run on a GPU.**
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import torch

from clo.engine.cuda.threads import poll
from clo_calibration.host_benchmarks import Benchmark, thread_benchmarks
from clo_kernels.gather_pages import gather_pages
from clo_kernels.layout import INT32, DeviceKV, Resolved, ring_rows
from clo_kernels.recorded_calls import Call, beside, recorded
from clo_kernels.ring_doorbell import ring_doorbell
from clo_kernels.sparse_decode_attention import sparse_decode_attention
from clo_kernels.wait_ready import raise_if_late, wait_ready

KIB, MIB = 2**10, 2**20
ARENA_BYTES = 256 * MIB
COPY_BYTES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
DESCRIPTORS = (16, 128, 512)
"""Fewer than a stream takes before the thread that submits them has to wait: about a thousand."""
PAGE_BYTES = (4 * KIB, 8 * KIB, 32 * KIB)
PROGRAMS = (1, 4, 16, 32)
GATHER_BYTES = 32 * MIB
NODES = 200
WARM_UP = 3
WARM_S = 0.05
"""An idle device runs at a fraction of its clock, and takes some tens of milliseconds of work to raise it."""
DELAY_CYCLES = 400_000
"""Longer than submitting one operation takes."""
MOST_DELAY_CYCLES = 100_000_000
"""More would not help: a stream that is full lets nobody submit until the delay is over, however long it is."""
CYCLES_PER_S = 2e9


def device_benchmarks(device: torch.device, threads: tuple[int, ...], repetitions: int = 15) -> list[Benchmark]:
    """Everything that has no model in it; then what the host's threads cost."""
    arena = torch.empty(ARENA_BYTES, dtype=torch.uint8, pin_memory=True)
    arena.copy_(torch.randint(0, 255, (ARENA_BYTES,), dtype=torch.uint8, device=device))
    there = torch.empty(ARENA_BYTES, dtype=torch.uint8, device=device)
    found = [*_copies(arena, there, repetitions), *_descriptors(arena, there, repetitions)]
    found += [_both_ways(arena, there, repetitions), *_memory(device, repetitions)]
    found += [_gather(arena, device, page, count, repetitions) for page in PAGE_BYTES for count in PROGRAMS]
    found += [*_launches(device, repetitions), *_waits(device, repetitions), _flags(device, repetitions)]
    return [*found, *_interference(arena, there, device, repetitions), *thread_benchmarks(threads, repetitions)]


def device_seconds(call: Call, repetitions: int, *, before: Call = lambda: None) -> tuple[float, ...]:
    """Between two events around `call` on the current stream, which is busy until all of it has been submitted."""
    samples, cycles = list[float](), delay_cycles(call, before)
    warm_ups, warm_at = WARM_UP, time.perf_counter() + WARM_S
    while len(samples) < repetitions:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before()
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if warm_ups > 0 or time.perf_counter() < warm_at:
            warm_ups -= 1
        else:
            samples.append(start.elapsed_time(end) / 1e3)
    return tuple(samples)


def delay_cycles(call: Call, before: Call = lambda: None) -> int:
    """Twice what submitting `call` to an idle device takes, once all that it needs has been compiled and loaded."""
    for _ in range(2):
        before()
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        submitting_s = time.perf_counter() - began
    torch.cuda.synchronize()
    return max(DELAY_CYCLES, min(MOST_DELAY_CYCLES, int(2 * CYCLES_PER_S * submitting_s)))


def host_seconds(call: Call, repetitions: int, calls: int) -> tuple[float, ...]:
    """Of the calling thread, for so many calls in a row."""
    samples = []
    for repetition in range(WARM_UP + repetitions):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        if repetition >= WARM_UP:
            samples.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return tuple(samples)


def _copies(arena: torch.Tensor, there: torch.Tensor, repetitions: int) -> Iterator[Benchmark]:
    """One descriptor, by its size and direction."""
    for name, target, source in (("dma to device", there, arena), ("dma to host", arena, there)):
        for size in COPY_BYTES:
            call = _copier(target[:size], source[:size])
            parameters = {"bytes": float(size)}
            yield Benchmark(name, parameters, "bytes", float(size), device_seconds(call, repetitions))


def _copier(target: torch.Tensor, source: torch.Tensor) -> Call:
    return lambda: target.copy_(source, non_blocking=True)


def _descriptors(arena: torch.Tensor, there: torch.Tensor, repetitions: int) -> Iterator[Benchmark]:
    """Pages of 8 KiB, one descriptor each: what the launching thread pays, and what the copy engine takes."""
    size = 8 * KIB
    order = torch.randperm(ARENA_BYTES // size, generator=torch.Generator().manual_seed(0)).tolist()
    for count in DESCRIPTORS:
        pages = [
            _copier(there[at * size : (at + 1) * size], arena[at * size : (at + 1) * size]) for at in order[:count]
        ]

        def submit(pages: list[Call] = pages) -> None:
            for copy in pages:
                copy()

        parameters, total = {"descriptors": float(count), "bytes": float(size)}, float(count * size)
        yield Benchmark("page copies", parameters, "bytes", total, device_seconds(submit, repetitions))
        seconds = host_seconds(submit, repetitions, 1)
        yield Benchmark("submit page copies", parameters, "times", float(count), seconds)


def _both_ways(arena: torch.Tensor, there: torch.Tensor, repetitions: int) -> Benchmark:
    """Half of the arena each way at once; the amount counts both."""
    other, half = torch.cuda.Stream(), ARENA_BYTES // 2
    to_device, to_host = _copier(there[:half], arena[:half]), _copier(arena[half:], there[half:])

    def both() -> None:
        current = torch.cuda.current_stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            to_host()
        to_device()
        current.wait_stream(other)

    return Benchmark("dma both ways", {}, "bytes", float(ARENA_BYTES), device_seconds(both, repetitions))


def _memory(device: torch.device, repetitions: int, size: int = 4096) -> Iterator[Benchmark]:
    """Reads and writes of a device copy both count; a product of bfloat16 matrices."""
    source = torch.empty(512 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel()
    yield Benchmark("device memory", {}, "bytes", moved, device_seconds(_copier(target, source), repetitions))
    left, right = (torch.randn((size, size), device=device, dtype=torch.bfloat16) for _ in range(2))
    yield Benchmark("matmul", {}, "FLOP", 2.0 * size**3, device_seconds(lambda: left @ right, repetitions))


def _gather(arena: torch.Tensor, device: torch.device, page_bytes: int, programs: int, repetitions: int) -> Benchmark:
    """Zero-copy: random pages of eight heads."""
    call = gather_call(arena, device, page_bytes, programs)
    parameters = {"page_bytes": float(page_bytes), "programs": float(programs)}
    return Benchmark("zero-copy", parameters, "bytes", float(GATHER_BYTES), device_seconds(call, repetitions))


def gather_call(arena: torch.Tensor, device: torch.device, page_bytes: int, programs: int) -> Call:
    """A launch that brings `GATHER_BYTES` of random pages."""
    heads, dim = 8, 128
    size = page_bytes // (4 * dim)
    pages = arena.view(torch.bfloat16).view(1, -1, heads, 2, size, dim)
    count = GATHER_BYTES // page_bytes // heads
    order = torch.rand(heads, pages.shape[1], device=device).argsort(1)[:, :count].to(INT32)[None].contiguous()
    slots = torch.arange(count, dtype=INT32, device=device).expand(1, heads, count).contiguous()
    fetch = Resolved(slots, order, slots.clone(), torch.full((1, heads), count, dtype=INT32, device=device))
    target = torch.empty((1, heads, count, 2, size, dim), dtype=torch.bfloat16, device=device)
    return lambda: gather_pages(pages, target, fetch, num_programs=programs)


def _launches(device: torch.device, repetitions: int) -> Iterator[Benchmark]:
    """A kernel that does next to nothing, one by one and in a graph."""
    word = torch.ones(1, device=device)
    event, stream = torch.cuda.Event(), torch.cuda.current_stream(device)
    replay = recorded([lambda: word.add_(1)] * NODES).replay
    nodes = {"nodes": float(NODES)}
    yield Benchmark("launch", {}, "times", 50.0, host_seconds(lambda: word.add_(1), repetitions, 50))
    yield Benchmark("graph replay", nodes, "times", 1.0, host_seconds(replay, repetitions, 1))
    yield Benchmark("graph node", nodes, "times", float(NODES), device_seconds(replay, repetitions))
    yield Benchmark("event record", {}, "times", 50.0, host_seconds(lambda: event.record(stream), repetitions, 50))
    yield Benchmark("event wait", {}, "times", 50.0, host_seconds(lambda: stream.wait_event(event), repetitions, 50))


def _waits(device: torch.device, repetitions: int) -> Iterator[Benchmark]:
    """What the launching thread pays to know that a kernel is over, and to read a word."""
    word, here = torch.ones(1, device=device), torch.empty(1, pin_memory=True)
    stream = torch.cuda.current_stream(device)

    def launch_and_wait() -> None:
        word.add_(1)
        event = torch.cuda.Event()
        event.record(stream)
        poll(event.query, 10.0)

    def read_back() -> None:
        here.copy_(word, non_blocking=True)
        stream.synchronize()

    yield Benchmark("stream sync", {}, "times", 20.0, host_seconds(stream.synchronize, repetitions, 20))
    yield Benchmark("launch and poll", {}, "times", 20.0, host_seconds(launch_and_wait, repetitions, 20))
    yield Benchmark("read back", {"bytes": 4.0}, "times", 20.0, host_seconds(read_back, repetitions, 20))


def _flags(device: torch.device, repetitions: int) -> Benchmark:
    """A doorbell, and the answer of a thread that polls as the decoder's does."""
    doorbell, ready = (torch.zeros(1, dtype=torch.int64, pin_memory=True) for _ in range(2))
    sequence, report = (
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    message, mailbox = torch.zeros(16, dtype=INT32, device=device), torch.zeros(16, dtype=INT32, pin_memory=True)
    seen, answer, over = doorbell.numpy(), ready.numpy(), threading.Event()

    def serve() -> None:
        while not over.is_set():
            poll(lambda: bool(seen[0] != answer[0]) or over.is_set(), 60.0)
            answer[0] = seen[0]

    def trip() -> None:
        ring_doorbell(sequence, message, mailbox, doorbell)
        wait_ready(sequence, ready, report)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        seconds = device_seconds(recorded([trip]).replay, repetitions)
        raise_if_late("ready flag", report)
    finally:
        over.set()
        thread.join(10.0)
    return Benchmark("flags there and back", {}, "times", 1.0, seconds)


def _interference(
    arena: torch.Tensor, there: torch.Tensor, device: torch.device, repetitions: int
) -> Iterator[Benchmark]:
    """Attention over a tenth of 128K tokens, eight sequences: alone, beside a copy engine, beside zero-copy."""
    attend = recorded([_attention(device)] * 16).replay
    yield Benchmark("attention alone", {}, "times", 16.0, device_seconds(attend, repetitions))
    others: list[tuple[str, dict[str, float], Call]] = [("attention beside dma", {}, _copier(there, arena))]
    for programs in PROGRAMS[1:]:
        call = gather_call(arena, device, 8 * KIB, programs)
        others.append(("attention beside zero-copy", {"programs": float(programs)}, call))
    for name, parameters, transfer in others:
        times = 2 + int(3 * min(device_seconds(attend, 3)) / min(device_seconds(transfer, 3)))
        seconds = beside(attend, transfer, times=times, repeats=repetitions, sleep_cycles=DELAY_CYCLES)
        if seconds:
            yield Benchmark(name, parameters, "times", 16.0, seconds)


def _attention(device: torch.device) -> Call:
    """Keys and values of 430 MB, more than a cache holds."""
    batch, heads, group, dim, page, budget, recent = 8, 8, 4, 128, 16, 819, 64

    def random(*shape: int) -> torch.Tensor:
        return torch.randn((batch, heads, *shape), device=device, dtype=torch.bfloat16)

    kv = DeviceKV(
        sinks=random(2, 4, dim),
        window=random(2, ring_rows(recent, page), dim),
        slots=random(budget, 2, page, dim),
        pinned=torch.empty((batch, 0, 2, 1, dim), device=device, dtype=torch.bfloat16),
        pinned_row=torch.full((heads,), -1, dtype=INT32, device=device),
        recent_tokens=recent,
    )
    query = torch.randn((batch, heads * group, dim), device=device, dtype=torch.bfloat16)
    slots = (
        torch.rand(batch * heads, budget, device=device).argsort(1).to(INT32).view(batch, heads, budget).contiguous()
    )
    lengths = torch.full((batch,), 131072, dtype=INT32, device=device)
    return lambda: sparse_decode_attention(query, kv, slots, lengths)
