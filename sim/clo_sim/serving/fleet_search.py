"""The fewest GPUs that serve a load within an SLO: fleets tried one after the other. Knows no machines and no prices.

More GPUs are taken never to hurt: they are searched by doubling and bisection. Runs in which an SLO cannot be met any
more are ended early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from clo.errors import SpecError
from clo_sim.serving.metrics import ServiceResult, latency_values, summarise_service, term_value
from clo_sim.serving.prefix import PrefixCache
from clo_sim.serving.records import Limits
from clo_sim.serving.requests import NS_PER_S, RequestTrace
from clo_sim.serving.service import ServiceRun, ServiceSettings, serve
from clo_sim.serving.slo import Slo, Term
from clo_sim.serving.worker import WorkerCosts

OF_MEMORY = ("gpu_memory", "host_memory")
"""Rejections that a larger machine would not make: a plan does not count them as served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One fleet under one load. `values` has the statistic of each term (empty if ended early), `failing` the terms
    that do not hold, worst first; `unstable` and rejections for lack of memory fail it as well."""

    gpus: int
    prefill_gpus: int = 0
    met: bool
    failing: tuple[str, ...]
    values: Mapping[str, float] = field(default_factory=dict)
    result: ServiceResult | None = None


def attempt(
    trace: RequestTrace, costs: WorkerCosts, slo: Slo, settings: ServiceSettings, *, stop_early: bool = True
) -> Attempt:
    """Serve `trace` and hold it against `slo`."""
    limits = limits_of(slo, len(trace)) if stop_early else Limits()
    tried = Attempt(gpus=settings.gpus, prefill_gpus=settings.prefill_gpus, met=False, failing=())
    run = serve(trace, costs, settings, limits=limits)
    if run.stopped:
        return replace(tried, failing=_late(run, slo, limits))
    values = latency_values(run)
    found = {term.name: term_value(term, values) for term in slo.terms}
    result = summarise_service(run, slo=slo)
    failing = lost_terms(found, slo)
    failing.sort(key=lambda term: -found[term.name] / term.limit_s)
    reasons = [term.name for term in failing]
    reasons += [f"{run.rejected[kind]} requests rejected ({kind})" for kind in OF_MEMORY if run.rejected[kind]]
    # a load that outgrows the service fails in time even if this run is too short to show it
    reasons += ["unstable"] if result.unstable and not failing else []
    result = replace(result, samples=())
    return replace(tried, met=not reasons, failing=tuple(reasons), values=found, result=result)


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


def lost_terms(values: Mapping[str, float], slo: Slo) -> list[Term]:
    """The terms that these values do not meet."""
    return [term for term in slo.terms if values[term.name] >= term.limit_s]


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

    start = near // costs.replica_gpus if near else math.floor(_least_load(trace, costs))
    return _fewest(tried, max_gpus // costs.replica_gpus, max(1, start), known=near is not None)


def search_disaggregated(
    trace: RequestTrace,
    costs: WorkerCosts,
    slo: Slo,
    settings: ServiceSettings,
    max_gpus: int,
    *,
    near: int | None = None,
) -> tuple[Attempt | None, Attempt]:
    """As `search`, with GPUs that only prefill: the fewest that keep up and meet the terms on TTFT, then the fewest
    others that meet the rest.

    TTFT knows nothing of those that decode, and more of those that prefill are taken not to help them. A limit on E2E
    could be met in many ways, and raises `SpecError`.
    """
    if any(term.metric == "e2e" for term in slo.terms):
        raise SpecError("an SLO on e2e does not say how much of it is prefill's: give limits on ttft, tpot or itl")
    size = costs.replica_gpus
    of_first = Slo(tuple(term for term in slo.terms if term.metric == "ttft"))
    first, failed = search(_prompts(trace, costs), costs, of_first, settings, max_gpus - size)
    if first is None:
        return None, failed

    def tried(replicas: int) -> Attempt:
        gpus = first.gpus + replicas * size
        return attempt(trace, costs, slo, replace(settings, gpus=gpus, prefill_gpus=first.gpus))

    start = max(1, (near - first.gpus) // size) if near else 1
    return _fewest(tried, (max_gpus - first.gpus) // size, start, known=near is not None)


def _prompts(trace: RequestTrace, costs: WorkerCosts) -> RequestTrace:
    """What those that only prefill have to do: one token of every answer."""
    served = (one for one in trace.requests if one.output_tokens and one.total_tokens <= costs.max_tokens)
    return replace(trace, requests=tuple(one._replace(output_tokens=1) for one in served))


def _fewest(tried: Callable[[int], Attempt], most: int, start: int, *, known: bool) -> tuple[Attempt | None, Attempt]:
    """The fewest replicas that do, if any up to `most`, and the most that do not. `known`: `start` is a good guess."""
    # near a known answer the bracket grows from one, else it doubles
    high, step = min(most, start), 1 if known else start
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


def seen_prefixes(trace: RequestTrace, costs: WorkerCosts) -> list[int]:
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


def _least_load(trace: RequestTrace, costs: WorkerCosts) -> float:
    """Replicas that prefill's computing alone keeps busy, every prefix seen before cached: no fewer can keep up."""
    if not trace.duration_s:
        return 1.0
    prefill, prefixes = costs.prefill, seen_prefixes(trace, costs)
    token_ns = prefill.dense_ns[-1] / prefill.chunk_tokens
    busy = 0.0
    for request, cached in zip(trace.requests, prefixes, strict=True):
        new = request.input_tokens - cached
        busy += token_ns * new + prefill.pair_ns * prefill.pairs(cached, new)
    return busy / NS_PER_S / trace.duration_s
