"""Calls recorded into a CUDA graph, to be timed by replaying it. Knows no operation. **Not yet run on a GPU.**"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


class RecordedCalls:
    """A graph and the calls it was recorded from: only they keep the tensors alive whose addresses it has."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: Sequence[Call]) -> None:
        self._graph, self._calls = graph, tuple(calls)

    def replay(self) -> None:
        """All calls once more, on the current stream. Holding this method is enough to keep everything."""
        self._graph.replay()


def recorded(calls: Sequence[Call]) -> RecordedCalls:
    """One graph of all calls; each runs once before, which compiles its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    finally:
        # a capture that cannot be ended leaves its own stream current
        torch.cuda.set_stream(before)
    return RecordedCalls(graph, calls)


def beside(work: Call, transfer: Call, *, times: int, repeats: int, sleep_cycles: int) -> tuple[float, ...]:
    """Seconds of `work` while another stream does `transfer` `times` over; samples not covered by it are dropped.

    The stream of `work` sleeps `sleep_cycles` first: the launching thread is then not what is measured.
    """
    other, samples = torch.cuda.Stream(), []
    for _ in range(repeats):
        start, end, covered = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            for _ in range(times):
                transfer()
            covered.record()
        torch.cuda._sleep(sleep_cycles)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if end.elapsed_time(covered) > 0:
            samples.append(start.elapsed_time(end) / 1e3)
    return tuple(samples)
