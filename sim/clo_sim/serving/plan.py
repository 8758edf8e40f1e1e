"""The smallest fleet that meets an SLO, what fails first, and how much more load it takes. Knows nothing about money.

A fleet is so many replicas on GPUs of one machine type, all with one design. More GPUs are taken never to hurt, and
more load never to help: both are searched by doubling and bisection. Runs in which an SLO cannot be met any more are
ended early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from clo.errors import CloError
from clo.specs import Design
from clo.units import format_seconds
from clo_sim.run import Executor
from clo_sim.scene import Scene
from clo_sim.serving.metrics import ServiceResult, latency_values, reasons_of, summarise_service, term_value
from clo_sim.serving.prefix import PrefixCache
from clo_sim.serving.records import Limits
from clo_sim.serving.requests import NS_PER_S, RequestTrace
from clo_sim.serving.service import ServiceRun, ServiceSettings, serve
from clo_sim.serving.slo import Slo, Term
from clo_sim.serving.worker import WorkerCosts, worker_costs

MAX_GPUS = 256
MAX_MULTIPLIER = 64.0
TOLERANCE = 0.02
"""Head-room is bisected to this relative width."""
OF_MEMORY = ("gpu_memory", "host_memory")
"""Rejections that a larger machine would not make: a plan does not count them as served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One fleet under one load. `values` has the statistic of each term (empty if ended early), `failing` the terms
    that do not hold, worst first; `unstable` and rejections for lack of memory fail it as well."""

    gpus: int
    met: bool
    failing: tuple[str, ...]
    values: Mapping[str, float] = field(default_factory=dict)
    result: ServiceResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What one design needs on one machine type. `gpus` is none where it cannot be done; `problem` says by what.

    `margin` is the worst term's share of its limit (1: at the limit); `head_room` the largest multiple of the load that
    the fleet bears (none without a rate), and `breaks_by` the term that fails beyond it; empty where none was found to.

    Where they were asked for: `gpus_interval` are the GPUs that the load needs with a probability of 90% (infinite
    where no number would do), `chance` the probability that `gpus` are enough, as the spreads of the costs have it.
    """

    machine: str
    design: str
    gpus: int | None = None
    problem: str = ""
    failing: tuple[str, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    margin: float = math.inf
    result: ServiceResult | None = None
    head_room: float | None = None
    breaks_by: str = ""
    gpus_interval: tuple[float, float] | None = None
    chance: float | None = None


def smallest_fleet(
    scene: Scene,
    design: Design,
    trace: RequestTrace,
    slo: Slo,
    settings: ServiceSettings,
    *,
    chunk_tokens: int = 2048,
    max_gpus: int = MAX_GPUS,
    near: int | None = None,
    executor: Executor = "clock",
) -> Fleet:
    """The fewest GPUs of `scene.machine` that serve `trace` within `slo` under `design`, or why no number does.

    `near` is a guess, such as what another design needs: it saves runs and changes nothing else.
    """
    fleet = Fleet(machine=scene.machine.name, design=design.name)
    try:
        costs = worker_costs(scene, design, trace, chunk_tokens=chunk_tokens, executor=executor)
    except CloError as error:
        return replace(fleet, problem=str(error))
    if max_gpus < costs.replica_gpus:
        return replace(fleet, problem=f"a replica takes {costs.replica_gpus} GPUs, {max_gpus} may be tried")
    alone = alone_values(trace, costs, slo)
    hopeless = lost_terms(alone, slo)
    if hopeless:
        worst = max(hopeless, key=lambda term: alone[term.name] / term.limit_s)
        failing = (worst.name, *(term.name for term in hopeless if term is not worst))
        idle = "an idle GPU" if costs.replica_gpus == 1 else f"{costs.replica_gpus} idle GPUs"
        problem = f"{worst.name} is {format_seconds(alone[worst.name])} even for requests alone on {idle}"
        return replace(fleet, problem=problem, failing=failing, values=alone)
    best, last = search(trace, costs, slo, settings, max_gpus, near=near)
    if best is None:
        problem = f"not with {last.gpus} GPUs: {', '.join(last.failing)} fails"
        return replace(fleet, problem=problem, failing=last.failing, values=last.values)
    if best.result is not None and not best.result.completed:
        problem = f"no request can be served: {reasons_of(best.result.rejected_by)}"
        return replace(fleet, problem=problem)
    margin = max(best.values[term.name] / term.limit_s for term in slo.terms)
    return replace(fleet, gpus=best.gpus, values=best.values, margin=margin, result=best.result)


def with_head_room(
    fleet: Fleet,
    scene: Scene,
    design: Design,
    trace: RequestTrace,
    slo: Slo,
    settings: ServiceSettings,
    *,
    chunk_tokens: int = 2048,
    executor: Executor = "clock",
) -> Fleet:
    """The fleet with the load it bears: by bisection, to `TOLERANCE`. Requests that all come at once have no rate."""
    if fleet.gpus is None or not trace.duration_s:
        return fleet
    costs = worker_costs(scene, design, trace, chunk_tokens=chunk_tokens, executor=executor)
    sized = replace(settings, gpus=fleet.gpus)
    low, high, broken = 1.0, 1.0, None
    while broken is None and high < MAX_MULTIPLIER:
        high *= 1.5
        tried = attempt(trace.at_rate(high), costs, slo, sized)
        low, broken = (high, None) if tried.met else (low, tried)
    while broken is not None and high / low > 1 + TOLERANCE:
        middle = math.sqrt(low * high)
        tried = attempt(trace.at_rate(middle), costs, slo, sized)
        if tried.met:
            low = middle
        else:
            high, broken = middle, tried
    return replace(fleet, head_room=low, breaks_by=broken.failing[0] if broken else "")


def latency_curve(
    scene: Scene,
    design: Design,
    trace: RequestTrace,
    slo: Slo,
    settings: ServiceSettings,
    multipliers: Sequence[float],
    *,
    chunk_tokens: int = 2048,
    executor: Executor = "clock",
) -> list[tuple[float, Attempt]]:
    """The fleet's statistics against multiples of the load, run to the end each."""
    costs = worker_costs(scene, design, trace, chunk_tokens=chunk_tokens, executor=executor)
    return [(one, attempt(trace.at_rate(one), costs, slo, settings, stop_early=False)) for one in multipliers]


def attempt(
    trace: RequestTrace, costs: WorkerCosts, slo: Slo, settings: ServiceSettings, *, stop_early: bool = True
) -> Attempt:
    """Serve `trace` and hold it against `slo`."""
    limits = limits_of(slo, len(trace)) if stop_early else Limits()
    run = serve(trace, costs, settings, limits=limits)
    if run.stopped:
        return Attempt(gpus=settings.gpus, met=False, failing=_late(run, slo, limits))
    values = latency_values(run)
    found = {term.name: term_value(term, values) for term in slo.terms}
    result = summarise_service(run, slo=slo)
    failing = lost_terms(found, slo)
    failing.sort(key=lambda term: -found[term.name] / term.limit_s)
    reasons = [term.name for term in failing]
    reasons += [f"{run.rejected[kind]} requests rejected ({kind})" for kind in OF_MEMORY if run.rejected[kind]]
    # a load that outgrows the service fails in time even if this run is too short to show it
    reasons += ["unstable"] if result.unstable and not failing else []
    return Attempt(
        gpus=settings.gpus, met=not reasons, failing=tuple(reasons), values=found, result=replace(result, samples=())
    )


def limits_of(slo: Slo, requests: int) -> Limits:
    """How many of `requests` may be late before a percentile of the SLO is lost."""
    found: dict[str, tuple[float, int]] = {}
    for term in slo.terms:
        if term.metric in ("ttft", "tpot") and term.quantile is not None:
            allowed = requests - math.ceil(term.quantile * requests - 1e-9)
            # of several percentiles of one metric, the largest is watched; all are checked at the end
            if term.metric not in found or allowed < found[term.metric][1]:
                found[term.metric] = (term.limit_s * NS_PER_S, allowed)
    ttft, tpot = (found.get(name, (math.inf, 0)) for name in ("ttft", "tpot"))
    return Limits(ttft_ns=ttft[0], allowed_ttft=ttft[1], tpot_ns=tpot[0], allowed_tpot=tpot[1])


def alone_values(trace: RequestTrace, costs: WorkerCosts, slo: Slo) -> dict[str, float]:
    """The SLO's statistics if every request had an idle replica, and every prefix seen before it were cached.

    What no number of replicas brings down (in practice: a prefix cache of one of them holds less).
    """
    clock = costs.clock(1)
    first, gap, whole, shortest, gaps = [], [], [], [], []
    for request, cached in zip(trace.requests, _seen_prefixes(trace, costs), strict=True):
        if not (request.input_tokens and request.output_tokens and request.total_tokens <= costs.max_tokens):
            continue
        # loading a prefix may take longer than computing it: the better of both bounds what a cache can do
        ttft = min(costs.alone_ns(request.input_tokens, one) for one in {0, cached})
        decode = clock.total(request.input_tokens + 1, request.output_tokens - 1)
        first.append(ttft / NS_PER_S)
        whole.append((ttft + decode) / NS_PER_S)
        if request.output_tokens > 1:
            gap.append(decode / (request.output_tokens - 1) / NS_PER_S)
            # steps grow with the context: none of its gaps is shorter than the first
            shortest.append(clock.total(request.input_tokens + 1, 1) / NS_PER_S)
            gaps.append(request.output_tokens - 1)
    values: dict[str, tuple[NDArray[np.float64], NDArray[np.int64] | None]] = {
        name: (np.array(seconds), None) for name, seconds in (("ttft", first), ("tpot", gap), ("e2e", whole))
    }
    values["itl"] = np.array(shortest), np.array(gaps, dtype=np.int64)
    return {term.name: term_value(term, values) for term in slo.terms}


def lost_terms(values: Mapping[str, float], slo: Slo) -> list[Term]:
    """The terms that these values do not meet."""
    return [term for term in slo.terms if values[term.name] >= term.limit_s]


def _seen_prefixes(trace: RequestTrace, costs: WorkerCosts) -> list[int]:
    """Tokens of each prompt that came before as a prefix, at most all but the last."""
    if not costs.block_bytes:
        return [0] * len(trace)
    seen, found = PrefixCache(), []
    for request in trace.requests:
        blocks = request.prefix_blocks[: request.input_tokens // trace.block_tokens]
        found.append(costs.reused_tokens(seen.held(blocks), trace.block_tokens, request.input_tokens))
        seen.add(blocks, 1 << 60)
    return found


def _late(run: ServiceRun, slo: Slo, limits: Limits) -> tuple[str, ...]:
    """The terms behind the limits that ended a run."""
    late = {"ttft": run.stamps.late_first > limits.allowed_ttft, "tpot": run.stamps.late_tokens > limits.allowed_tpot}
    return tuple(term.name for term in slo.terms if late.get(term.metric, False) and _is_strictest(term, slo))


def _is_strictest(term: Term, slo: Slo) -> bool:
    quantiles = [other.quantile or 0.0 for other in slo.terms if other.metric == term.metric]
    return term.quantile is not None and term.quantile == max(quantiles)


def search(
    trace: RequestTrace,
    costs: WorkerCosts,
    slo: Slo,
    settings: ServiceSettings,
    max_gpus: int,
    *,
    near: int | None = None,
    known: Attempt | None = None,
) -> tuple[Attempt | None, Attempt]:
    """The smallest fleet that meets the SLO, if any up to `max_gpus`, and the largest that does not.

    `near` is a guess, and `known` a fleet that was tried before: they save runs.
    """

    def tried(replicas: int) -> Attempt:
        if known is not None and known.gpus == replicas * costs.replica_gpus:
            return known
        return attempt(trace, costs, slo, replace(settings, gpus=replicas * costs.replica_gpus))

    most = max_gpus // costs.replica_gpus
    start = near // costs.replica_gpus if near else math.floor(_least_load(trace, costs))
    # near a known answer the bracket grows from one, else it doubles
    high, step = min(most, max(1, start)), 1 if near else max(1, start)
    found, low, failed = tried(high), 0, None
    while not found.met:
        if high == most or _of_memory(found):
            return None, found
        low, failed = high, found
        high, step = min(most, high + step), 2 * step
        found = tried(high)
    step = 1
    while failed is None and high > 1:
        fewer, step = max(1, high - step), 2 * step
        lower = tried(fewer)
        if lower.met:
            high, found = fewer, lower
        else:
            low, failed = fewer, lower
    while high - low > 1:
        between = (low + high) // 2
        middle = tried(between)
        if middle.met:
            high, found = between, middle
        else:
            low, failed = between, middle
    return found, failed or found


def _of_memory(tried: Attempt) -> bool:
    """More replicas do not help a request that is larger than one of them."""
    return any(reason.endswith(f"({kind})") for reason in tried.failing for kind in OF_MEMORY)


def _least_load(trace: RequestTrace, costs: WorkerCosts) -> float:
    """Replicas that prefill's computing alone keeps busy, every prefix seen before cached: no fewer can keep up."""
    if not trace.duration_s:
        return 1.0
    prefill, prefixes = costs.prefill, _seen_prefixes(trace, costs)
    token_ns = prefill.dense_ns[-1] / prefill.chunk_tokens
    busy = 0.0
    for request, cached in zip(trace.requests, prefixes, strict=True):
        new = request.input_tokens - cached
        busy += token_ns * new + prefill.pair_ns * prefill.pairs(cached, new)
    return busy / NS_PER_S / trace.duration_s
