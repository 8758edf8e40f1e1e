"""Times of device work and of host calls. Knows no operation.

Device work is recorded into a CUDA graph and its replays are timed with events, behind a short sleep on the device: the
launching thread is then never what is measured. Calls in one graph rotate over their own data, more than the L2 holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from clo_kernels.recorded_calls import Call, recorded
from clo_kernels_bench.figures import scaled

SLEEP_CYCLES = 400_000
"""About 0.2 ms: longer than launching a graph of SLEEP_CALLS calls takes."""
SLEEP_CALLS = 128
WARM_S = 0.05
"""An idle device runs at a fraction of its clock, and takes some tens of milliseconds of work to raise it."""


def graph_samples(calls: Sequence[Call], *, repeats: int = 20) -> tuple[float, ...]:
    """Microseconds of one call inside a graph of `calls`, one sample a replay."""
    sleep = SLEEP_CYCLES * -(-len(calls) // SLEEP_CALLS)
    return scaled(event_samples(recorded(calls).replay, repeats=repeats, sleep_cycles=sleep), len(calls))


def event_samples(
    call: Call, *, repeats: int = 20, warmups: int = 3, sleep_cycles: int = SLEEP_CYCLES
) -> tuple[float, ...]:
    """Microseconds between two events around `call` on the current stream."""
    _warm_up(call, warmups)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in pairs:
        torch.cuda._sleep(sleep_cycles)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) * 1e3 for start, end in pairs)


def _warm_up(call: Call, warmups: int) -> None:
    """Call it so many times, and until the device has been busy for a while: what was compiled before left it idle."""
    end = time.perf_counter() + WARM_S
    while warmups > 0 or time.perf_counter() < end:
        call()
        torch.cuda.synchronize()
        warmups -= 1


def host_samples(call: Call, *, calls: int, repeats: int = 20, after: Call = lambda: None) -> tuple[float, ...]:
    """Microseconds of the calling thread for one of `calls` calls in a row; `after` each row, outside the time."""
    call()
    after()
    samples = []
    for _ in range(repeats):
        begun = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - begun) / 1e3)
        after()
    return scaled(samples, calls)


def copies_beyond_cache(num_bytes: float, device: torch.device, *, at_most: int = 32) -> int:
    """How many calls with data of their own read four times what the L2 holds, so that a call finds none of its own."""
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return int(max(1, min(at_most, -(-4 * cache // max(1, num_bytes)))))
