"""Workers with round costs: a given step time, prompts that cost nothing unless asked, memory that counts tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clo_sim.serving import Request, RequestTrace, ServiceRun, WorkerCosts
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.memory import MemoryNeed, MemoryRoom
from clo_sim.serving.prefill import PrefillPrices

PLENTY = 10**15


def growing_clock(batch: int) -> StepClock:
    """Longer steps for larger batches and contexts, with no common divisor."""
    return StepClock.of([997 + 101 * batch + 13 * bucket * batch for bucket in range(12)], shift=2)


def toy_costs(
    *,
    step_ns: int = 1_000_000,
    clock: Callable[[int], StepClock] | None = None,
    token_ns: int = 0,
    chunk_tokens: int = 64,
    device_tokens: int = PLENTY,
    host_tokens: int = PLENTY,
    block_tokens: int = 0,
    max_tokens: int = PLENTY,
) -> WorkerCosts:
    """A token takes a byte of either memory, and of a network; with `block_tokens`, prompts are kept as prefixes."""
    flat = StepClock.of([step_ns], shift=50)
    return WorkerCosts(
        clock=clock or (lambda batch: flat),
        prefill=PrefillPrices(dense_ns=[token_ns * tokens for tokens in range(chunk_tokens + 1)]),
        need=MemoryNeed(device_base=0, device_per_token=1, host_per_token=1),
        room=MemoryRoom(device=device_tokens, host=host_tokens),
        max_tokens=max_tokens,
        block_bytes=block_tokens,
        handed_token_bytes=1.0,
    )


def trace_of(
    rows: Sequence[tuple[int, int, int] | tuple[int, int, int, tuple[int, ...]]], block_tokens: int = 4
) -> RequestTrace:
    """Requests from (arrival_ns, input, output[, prefix blocks])."""
    return RequestTrace("toy", tuple(Request(*row) for row in rows), block_tokens)


def times_in_system(run: ServiceRun) -> np.ndarray[Any, Any]:
    arrival = np.array([request.arrival_ns for request in run.trace.requests])
    return (np.array(run.stamps.finish_ns) - arrival) / 1e9
