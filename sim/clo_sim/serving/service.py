"""Workers side by side: requests are checked, routed on arrival, and served to the end. Knows no prices.

Every worker is a replica: one GPU that holds the whole model, or several that share it, with its own queue and its own
share of the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from clo.errors import SpecError
from clo_sim.serving.records import NOT_YET, Limits, Stamps
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

    With `prefill_gpus` so many of the GPUs only prefill, the others only decode (but what they preempt they prefill
    again themselves). A prompt's first token comes out where it is prefilled; its KV then goes over a network of
    `network_bytes_per_s` for each GPU, and nothing else is taken to be on it.
    """

    gpus: int = 1
    prefill_gpus: int = 0
    network_bytes_per_s: float = 50e9
    routing: Routing = "least_loaded"
    pressure: Pressure = "preempt"
    max_batch: int = 256
    coalesce: bool = True

    def __post_init__(self) -> None:
        _require(self.gpus >= 1, f"gpus = {self.gpus}: must be at least 1")
        _require(
            0 <= self.prefill_gpus < self.gpus,
            f"prefill_gpus = {self.prefill_gpus}: must leave some of gpus = {self.gpus} to decode on",
        )
        _require(
            0 < self.network_bytes_per_s < math.inf,
            f"network_bytes_per_s = {self.network_bytes_per_s:g}: must be positive and finite",
        )
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
    """What happened. `rejected` counts requests by reason; `stopped` says that `limits` ended the run early.

    `replicas` are those that prefill alone before those that decode.
    """

    trace: RequestTrace
    costs: WorkerCosts
    settings: ServiceSettings
    stamps: Stamps
    replicas: list[Replica]
    rejected: Counter[str] = field(default_factory=Counter)
    stopped: bool = False

    @property
    def decoders(self) -> list[Replica]:
        """Those that do not prefill alone."""
        return self.replicas[self.settings.prefill_gpus // self.costs.replica_gpus :]


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
    if settings.prefill_gpus:
        return _serve_apart(trace, costs, settings, limits or Limits(), progress)
    return _serve_together(trace, costs, settings, limits=limits, progress=progress)


def _serve_apart(
    trace: RequestTrace, costs: WorkerCosts, settings: ServiceSettings, limits: Limits, progress: Progress | None
) -> ServiceRun:
    """Prefill everything on some workers, then decode on others what they hand over: nothing goes the other way."""
    size = costs.replica_gpus
    _require(
        settings.prefill_gpus % size == 0,
        f"prefill_gpus = {settings.prefill_gpus}: a replica takes {size} (machine.tensor_parallel)",
    )
    prefilling = replace(settings, gpus=settings.prefill_gpus, prefill_gpus=0)
    decoding = replace(settings, gpus=settings.gpus - settings.prefill_gpus, prefill_gpus=0)
    idle = Replica(costs, Stamps.of(0), Limits())
    kept, rejected = [], Counter[str]()
    for number, request in enumerate(trace.requests):
        if problem := _problem(request, costs, idle):
            rejected[problem] += 1
        else:
            kept.append(number)
    prompts = tuple(trace.requests[number]._replace(output_tokens=1) for number in kept)
    every_ns = _sampling_ns(trace)
    first = _serve_together(
        replace(trace, requests=prompts), costs, prefilling, limits=limits, progress=progress, every_ns=every_ns
    )
    stamps = Stamps.of(len(trace))
    for number, moment in zip(kept, first.stamps.finish_ns, strict=True):
        stamps.first_ns[number] = stamps.finish_ns[number] = moment
    stamps.late_first = first.stamps.late_first
    run = ServiceRun(
        trace=trace, costs=costs, settings=settings, stamps=stamps, replicas=first.replicas, rejected=rejected
    )
    if first.stopped:
        return replace(run, stopped=True)
    answers = sorted(
        (stamps.first_ns[number] + costs.hand_over_ns(request.input_tokens, settings.network_bytes_per_s), number)
        for number, request in ((number, trace.requests[number]) for number in kept)
        if request.output_tokens > 1
    )
    handed = tuple(trace.requests[number]._replace(arrival_ns=ready, prefix_blocks=()) for ready, number in answers)
    firsts = [stamps.first_ns[number] for _, number in answers]
    second = _serve_together(
        replace(trace, requests=handed), costs, decoding, limits=limits, handed_ns=firsts, every_ns=every_ns
    )
    for (_, number), moment in zip(answers, second.stamps.finish_ns, strict=True):
        stamps.finish_ns[number] = moment
    stamps.late_tokens = second.stamps.late_tokens
    return replace(run, replicas=[*first.replicas, *second.replicas], stopped=second.stopped)


def _serve_together(
    trace: RequestTrace,
    costs: WorkerCosts,
    settings: ServiceSettings,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
    handed_ns: list[int] | None = None,
    every_ns: int = 0,
) -> ServiceRun:
    """On workers that do both, or those of `handed_ns` after their first token."""
    stamps, bounds = Stamps.of(len(trace)), limits or Limits()
    replicas = [
        Replica(
            costs,
            stamps,
            bounds,
            pressure=settings.pressure,
            max_batch=settings.max_batch,
            block_tokens=trace.block_tokens,
            coalesce=settings.coalesce,
            sample_every_ns=every_ns or _sampling_ns(trace),
        )
        for _ in range(_num_replicas(settings, costs))
    ]
    run = ServiceRun(trace=trace, costs=costs, settings=settings, stamps=stamps, replicas=replicas)
    if handed_ns is not None:
        stamps.first_ns[:] = handed_ns
    stopped = _arrivals(run, bounds, progress, handed_ns)
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


def _sampling_ns(trace: RequestTrace) -> int:
    return int(trace.duration_s * NS_PER_S) // SAMPLES or NS_PER_MS


def _num_replicas(settings: ServiceSettings, costs: WorkerCosts) -> int:
    replicas, left = divmod(settings.gpus, costs.replica_gpus)
    _require(not left, f"gpus = {settings.gpus}: a replica takes {costs.replica_gpus} (machine.tensor_parallel)")
    return replicas


def _arrivals(run: ServiceRun, limits: Limits, progress: Progress | None, handed_ns: list[int] | None) -> bool:
    """Route every request; whether it was stopped because too many were late."""
    choose = _ROUTERS[run.settings.routing] if len(run.replicas) > 1 else _round_robin
    block_tokens, total = run.trace.block_tokens, len(run.trace)
    for number, request in enumerate(run.trace.requests):
        problem = _problem(request, run.costs, run.replicas[0])
        if problem:
            run.rejected[problem] += 1
            continue
        sequence = Sequence(number, request, block_tokens, NOT_YET if handed_ns is None else handed_ns[number])
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


def _problem(request: Request, costs: WorkerCosts, idle: Replica) -> str:
    """Why a request is rejected on arrival; empty if it is not."""
    if request.input_tokens < 1:
        return "empty_prompt"
    if request.output_tokens < 1:
        return "empty_output"
    if request.total_tokens > costs.max_tokens:
        return "longer_than_model"
    return idle.fits_alone(request)


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
