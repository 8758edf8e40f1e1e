"""Workers side by side: requests are checked, routed on arrival, and served to the end. Knows no prices.

Every worker is a replica: one GPU that holds the whole model, or several that share it, with its own queue and its own
share of the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from clo.errors import SpecError
from clo_sim.serving.records import Limits, Stamps
from clo_sim.serving.replica import NEVER, Pressure, Replica, Sequence
from clo_sim.serving.requests import NS_PER_MS, NS_PER_S, Request, RequestTrace
from clo_sim.serving.worker import MAX_BATCH, WorkerCosts

Routing = Literal["least_loaded", "round_robin", "prefix"]
SAMPLES = 400
"""States kept of each worker while requests arrive."""

Progress = Callable[[int, int], None]
"""Called with (requests arrived, requests in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """How the service is run, on how many GPUs in all: a replica takes as many as share the model.

    Routing on arrival: `least_loaded` (fewest unfinished requests), `round_robin`, or `prefix` (fewest prompt tokens
    left to prefill there, this request's included, after what the worker's prefix cache holds). Under pressure a worker
    either admits on today's need and preempts the newest when memory runs out (`preempt`: its prompt is computed anew),
    or admits only what fits to its end (`queue`: needs the answer's length in advance). `coalesce = False` takes every
    decode step by itself: slower, the same to the nanosecond.
    """

    gpus: int = 1
    routing: Routing = "least_loaded"
    pressure: Pressure = "preempt"
    max_batch: int = 256
    coalesce: bool = True

    def __post_init__(self) -> None:
        _require(self.gpus >= 1, f"gpus = {self.gpus}: must be at least 1")
        _require(1 <= self.max_batch <= MAX_BATCH, f"max_batch = {self.max_batch}: must be from 1 to {MAX_BATCH}")
        _require(
            self.routing in get_args(Routing), f"routing = {self.routing!r}: one of {', '.join(get_args(Routing))}"
        )
        _require(
            self.pressure in get_args(Pressure), f"pressure = {self.pressure!r}: one of {', '.join(get_args(Pressure))}"
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SpecError(f"service.{message}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ServiceRun:
    """What happened. `rejected` counts requests by reason; `stopped` says that `limits` ended the run early."""

    trace: RequestTrace
    costs: WorkerCosts
    settings: ServiceSettings
    stamps: Stamps
    replicas: list[Replica]
    rejected: Counter[str] = field(default_factory=Counter)
    stopped: bool = False


def serve(
    trace: RequestTrace,
    costs: WorkerCosts,
    settings: ServiceSettings,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ServiceRun:
    """Serve every request of `trace`; with `limits`, stop once too many of them are late.

    Raises `SpecError` where that takes longer than moments can be counted, 146 years.
    """
    stamps, bounds = Stamps.of(len(trace)), limits or Limits()
    every_ns = int(trace.duration_s * NS_PER_S) // SAMPLES or NS_PER_MS
    replicas = [
        Replica(
            costs,
            stamps,
            bounds,
            pressure=settings.pressure,
            max_batch=settings.max_batch,
            block_tokens=trace.block_tokens,
            coalesce=settings.coalesce,
            sample_every_ns=every_ns,
        )
        for _ in range(_num_replicas(settings, costs))
    ]
    run = ServiceRun(trace=trace, costs=costs, settings=settings, stamps=stamps, replicas=replicas)
    stopped = _arrivals(run, bounds, progress)
    if not stopped:
        for replica in replicas:
            replica.advance(NEVER)
            if replica.now_ns >= NEVER:
                raise SpecError("service: the last request would be done in over a century: a cost is far too large")
        stopped = _hopeless(stamps, bounds)
    return ServiceRun(
        trace=trace,
        costs=costs,
        settings=settings,
        stamps=stamps,
        replicas=replicas,
        rejected=run.rejected,
        stopped=stopped,
    )


def _num_replicas(settings: ServiceSettings, costs: WorkerCosts) -> int:
    replicas, left = divmod(settings.gpus, costs.replica_gpus)
    _require(not left, f"gpus = {settings.gpus}: a replica takes {costs.replica_gpus} (machine.tensor_parallel)")
    return replicas


def _arrivals(run: ServiceRun, limits: Limits, progress: Progress | None) -> bool:
    """Route every request; whether it was stopped because too many were late."""
    choose = _ROUTERS[run.settings.routing] if len(run.replicas) > 1 else _round_robin
    block_tokens, total = run.trace.block_tokens, len(run.trace)
    for number, request in enumerate(run.trace.requests):
        problem = _problem(request, run)
        if problem:
            run.rejected[problem] += 1
            continue
        sequence = Sequence(number, request, block_tokens)
        replica = choose(run.replicas, sequence, number)
        replica.advance(request.arrival_ns)
        replica.enqueue(sequence)
        if number % 256 == 0:
            if _hopeless(run.stamps, limits):
                return True
            if progress is not None:
                progress(number, total)
    return False


def _hopeless(stamps: Stamps, limits: Limits) -> bool:
    return stamps.late_first > limits.allowed_ttft or stamps.late_tokens > limits.allowed_tpot


def _problem(request: Request, run: ServiceRun) -> str:
    """Why a request is rejected on arrival; empty if it is not."""
    if request.input_tokens < 1:
        return "empty_prompt"
    if request.output_tokens < 1:
        return "empty_output"
    if request.total_tokens > run.costs.max_tokens:
        return "longer_than_model"
    return run.replicas[0].fits_alone(request)


def _round_robin(replicas: list[Replica], sequence: Sequence, number: int) -> Replica:
    return replicas[number % len(replicas)]


def _least_loaded(replicas: list[Replica], sequence: Sequence, number: int) -> Replica:
    _catch_up(replicas, sequence.request.arrival_ns)
    return min(replicas, key=lambda replica: replica.unfinished)


def _prefix(replicas: list[Replica], sequence: Sequence, number: int) -> Replica:
    _catch_up(replicas, sequence.request.arrival_ns)
    return min(replicas, key=lambda replica: (replica.tokens_to_prefill(sequence), replica.unfinished))


def _catch_up(replicas: list[Replica], now_ns: int) -> None:
    """Bring those up to date in which something may have changed: a router sees completions, not steps."""
    for replica in replicas:
        if replica.unfinished and replica.next_change_ns < now_ns:
            replica.advance(now_ns)


_ROUTERS = {"least_loaded": _least_loaded, "round_robin": _round_robin, "prefix": _prefix}
