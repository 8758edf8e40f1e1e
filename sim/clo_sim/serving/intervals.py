"""Prediction intervals of services and fleets: simulated again with costs drawn from their spreads.

Knows nothing about how costs are drawn; see `clo_sim.intervals`, whose level and number of draws are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clo.specs import Design
from clo_sim.intervals import DRAWS, LEVEL, CostDraw, interval_of
from clo_sim.run import Executor
from clo_sim.scene import Scene
from clo_sim.serving.fleet_search import Attempt, attempt, lost_terms, search, search_disaggregated
from clo_sim.serving.metrics import ServiceResult, known_spread_share, summarise_service
from clo_sim.serving.plan import MAX_GPUS, Fleet, alone_values
from clo_sim.serving.requests import RequestTrace
from clo_sim.serving.service import ServiceRun, ServiceSettings, serve
from clo_sim.serving.slo import Slo
from clo_sim.serving.worker import WorkerCosts, drawn_costs, worker_costs

UNSTEADY = ("ttft_s", "e2e_s")
"""Metrics without bound where a service does not keep up."""
RATES = ("output_tokens_per_s", "completed_per_s", "goodput_per_s", "busy_share", "prefill_share", "mean_running")

Progress = Callable[[int, int], None]
"""Called with (draws done, draws in all)."""


def with_intervals(
    result: ServiceResult,
    run: ServiceRun,
    *,
    slo: Slo | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> ServiceResult:
    """`result` of `run` with 90% intervals of latencies and rates, and how often each term of `slo`, and all, hold."""
    drawn = []
    for number, costs in enumerate(_drawn(run.costs, range(draws), seed)):
        drawn.append(summarise_service(serve(run.trace, costs, run.settings), slo=slo))
        if progress is not None:
            progress(number + 1, draws)
    return _spanned(result, drawn, known_spread_share(run))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnFleet:
    """A fleet under some draws: what it did, and the fewest GPUs that are enough (infinite: no number is), by draw.

    `share` is the share of its busy time on costs whose spread is known; of the part with the first draw only.
    """

    tried: tuple[Attempt, ...]
    needed: tuple[float, ...]
    share: float | None


def drawn_fleet(
    fleet: Fleet,
    scene: Scene,
    design: Design,
    trace: RequestTrace,
    slo: Slo,
    settings: ServiceSettings,
    *,
    draws: Sequence[int],
    chunk_tokens: int = 2048,
    max_gpus: int = MAX_GPUS,
    executor: Executor = "clock",
    seed: int = 0,
) -> DrawnFleet:
    """A fleet that meets the SLO, under the draws of these numbers: parts of all draws may be served side by side."""
    assert fleet.gpus is not None
    base = worker_costs(scene, design, trace, chunk_tokens=chunk_tokens, executor=executor)
    sized = replace(settings, gpus=fleet.gpus, prefill_gpus=fleet.prefill_gpus)
    tried, needed = [], []
    for costs in _drawn(base, draws, seed):
        tried.append(attempt(trace, costs, slo, sized, stop_early=False))
        needed.append(_needed(tried[-1], trace, costs, slo, settings, max_gpus))
    share = known_spread_share(serve(trace, base, sized)) if 0 in draws else None
    return DrawnFleet(tried=tuple(tried), needed=tuple(needed), share=share)


def fleet_with_intervals(fleet: Fleet, parts: Sequence[DrawnFleet]) -> Fleet:
    """The fleet with intervals of its result, of the GPUs that the load needs, and the chance that these are enough."""
    assert fleet.result is not None
    tried = [one for part in parts for one in part.tried]
    return replace(
        fleet,
        gpus_interval=of_counts([gpus for part in parts for gpus in part.needed]),
        chance=sum(one.met for one in tried) / len(tried),
        result=_spanned(fleet.result, [_result(one) for one in tried], parts[0].share),
    )


def _needed(
    tried: Attempt, trace: RequestTrace, costs: WorkerCosts, slo: Slo, settings: ServiceSettings, max_gpus: int
) -> float:
    """The fewest GPUs that are enough, near those of `tried`; infinite where none are."""
    network = settings.network_bytes_per_s if tried.prefill_gpus else None
    if not tried.met and lost_terms(alone_values(trace, costs, slo, network_bytes_per_s=network), slo):
        return math.inf
    if tried.prefill_gpus:
        enough, _ = search_disaggregated(trace, costs, slo, settings, max_gpus, near=tried.gpus)
    else:
        enough, _ = search(trace, costs, slo, settings, max_gpus, near=tried.gpus, known=tried)
    return math.inf if enough is None else enough.gpus


def _result(tried: Attempt) -> ServiceResult:
    assert tried.result is not None  # it was not stopped early
    return tried.result


def _drawn(costs: WorkerCosts, draws: Iterable[int], seed: int) -> Iterator[WorkerCosts]:
    for number in draws:
        yield drawn_costs(costs, CostDraw(np.random.default_rng((seed, number))))


def _spanned(result: ServiceResult, drawn: list[ServiceResult], share: float | None) -> ServiceResult:
    spans = {}
    for name, value in numbers(result).items():
        values = [numbers(one)[name] for one in drawn]
        if all(one is not None for one in (value, *values)):
            found = interval_of([float(one) for one in values if one is not None])
            spans[name] = (found.low, found.high)
    chance = {term: sum(one.slo_met[term] for one in drawn) / len(drawn) for term in result.slo_met}
    together = sum(one.met() for one in drawn) / len(drawn) if chance else None
    return replace(result, intervals=spans, interval_share=share, slo_chance=chance, chance=together)


def numbers(result: ServiceResult) -> dict[str, float | None]:
    """What has intervals, by flat name; infinite where the service does not keep up, none where nothing was counted."""
    found = result.latencies() | {name: getattr(result, name) for name in RATES}
    if result.unstable:
        found |= {name: math.inf for name in found if name.startswith(UNSTEADY)}
    return found


def of_counts(values: list[float]) -> tuple[float, float]:
    """As `interval_of`, but outwards to whole numbers; infinite where no number was enough."""
    tail = (1 - LEVEL) / 2 * (len(values) + 1)
    ordered = sorted(values)
    low = max(1, math.floor(tail))
    return ordered[low - 1], ordered[-low]
