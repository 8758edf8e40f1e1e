"""The smallest fleet that meets an SLO, what fails first, and how much more load it takes. Knows nothing about money.

A fleet is so many replicas on GPUs of one machine type, all with one design. More load is taken never to help: what a
fleet bears is searched by doubling and bisection.
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
from clo_sim.serving.fleet_search import Attempt, attempt, lost_terms, search, search_disaggregated, seen_prefixes
from clo_sim.serving.metrics import ServiceResult, reasons_of, term_value
from clo_sim.serving.requests import NS_PER_S, RequestTrace
from clo_sim.serving.service import ServiceSettings
from clo_sim.serving.slo import Slo
from clo_sim.serving.worker import WorkerCosts, worker_costs

MAX_GPUS = 256
MAX_MULTIPLIER = 64.0
TOLERANCE = 0.02
"""Head-room is bisected to this relative width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What one design needs on one machine type. `gpus` is none where it cannot be done; `problem` says by what. Of the
    GPUs `prefill_gpus` only prefill, if they are disaggregated.

    `margin` is the worst term's share of its limit (1: at the limit); `head_room` the largest multiple of the load that
    the fleet bears (none without a rate), and `breaks_by` the term that fails beyond it; empty where none was found to.

    Where they were asked for: `gpus_interval` are the GPUs that the load needs with a probability of 90% (infinite
    where no number would do), `chance` the probability that `gpus` are enough, as the spreads of the costs have it.
    """

    machine: str
    design: str
    gpus: int | None = None
    prefill_gpus: int = 0
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
    disaggregated: bool = False,
) -> Fleet:
    """The fewest GPUs of `scene.machine` that serve `trace` within `slo` under `design`, or why no number does.

    `near` is a guess, such as what another design needs: it saves runs and changes nothing else. `disaggregated` gives
    prefill GPUs of its own, as many as the limits on TTFT need.
    """
    fleet = Fleet(machine=scene.machine.name, design=design.name)
    try:
        costs = worker_costs(scene, design, trace, chunk_tokens=chunk_tokens, executor=executor)
    except CloError as error:
        return replace(fleet, problem=str(error))
    if max_gpus < (least := costs.replica_gpus * (1 + disaggregated)):
        what = "one replica to prefill and one to decode take" if disaggregated else "a replica takes"
        return replace(fleet, problem=f"{what} {least} GPUs, {max_gpus} may be tried")
    network = settings.network_bytes_per_s if disaggregated else None
    alone = alone_values(trace, costs, slo, network_bytes_per_s=network)
    hopeless = lost_terms(alone, slo)
    if hopeless:
        worst = max(hopeless, key=lambda term: alone[term.name] / term.limit_s)
        failing = (worst.name, *(term.name for term in hopeless if term is not worst))
        idle = "an idle GPU" if costs.replica_gpus == 1 else f"{costs.replica_gpus} idle GPUs"
        way = " and, once prefilled, on the way to another" if disaggregated else ""
        problem = f"{worst.name} is {format_seconds(alone[worst.name])} even for requests alone on {idle}{way}"
        return replace(fleet, problem=problem, failing=failing, values=alone)
    find = search_disaggregated if disaggregated else search
    best, last = find(trace, costs, slo, settings, max_gpus, near=near)
    if best is None:
        problem = f"not with {last.gpus} GPUs: {', '.join(last.failing)} fails"
        return replace(fleet, problem=problem, failing=last.failing, values=last.values)
    if best.result is not None and not best.result.completed:
        problem = f"no request can be served: {reasons_of(best.result.rejected_by)}"
        return replace(fleet, problem=problem)
    margin = max(best.values[term.name] / term.limit_s for term in slo.terms)
    found = replace(fleet, gpus=best.gpus, prefill_gpus=best.prefill_gpus)
    return replace(found, values=best.values, margin=margin, result=best.result)


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
    sized = replace(settings, gpus=fleet.gpus, prefill_gpus=fleet.prefill_gpus)
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


def alone_values(
    trace: RequestTrace, costs: WorkerCosts, slo: Slo, *, network_bytes_per_s: float | None = None
) -> dict[str, float]:
    """The SLO's statistics if every request had an idle replica, and every prefix seen before it were cached.

    Over a network, one to prefill on and one to decode on.
    What no number of replicas brings down (in practice: a prefix cache of one of them holds less).
    """
    clock = costs.clock(1)
    first, gap, whole, shortest, gaps = [], [], [], [], []
    for request, cached in zip(trace.requests, seen_prefixes(trace, costs), strict=True):
        if not (request.input_tokens and request.output_tokens and request.total_tokens <= costs.max_tokens):
            continue
        # loading a prefix may take longer than computing it: the better of both bounds what a cache can do
        ttft = min(costs.alone_ns(request.input_tokens, one) for one in {0, cached})
        decode = clock.total(request.input_tokens + 1, request.output_tokens - 1)
        if network_bytes_per_s is not None and request.output_tokens > 1:
            decode += costs.hand_over_ns(request.input_tokens, network_bytes_per_s)
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
