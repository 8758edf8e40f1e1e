"""Prediction intervals: the simulation repeated with costs drawn from their spreads. Knows nothing about calibration.

Every price entry gets one factor a draw, for all its operations: errors of a cost are taken as systematic. Factors are
log-normal with mean 1. Costs whose spread is not known do not vary, and `known_share` says how much of the time those
that do account for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from clo.results import Result
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep
from clo_sim.simulator import run_simpy
from clo_sim.step_times import StepTimes

LEVEL = 0.9
DRAWS = 40


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a number lies with probability `LEVEL`."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Prediction:
    """Intervals of step numbers, by name, in seconds."""

    intervals: dict[str, Interval]
    known_share: float


class CostDraw:
    """One draw of all costs: a factor for every price entry, drawn when it is first asked for."""

    def __init__(self, source: np.random.Generator) -> None:
        self._source = source
        self._factors: dict[str, float] = {}

    def factor(self, entry: str, spread: float) -> float:
        """Log-normal with mean 1 and relative standard deviation `spread`; the same for the same entry."""
        if entry not in self._factors:
            self._factors[entry] = _factor(self._source, spread)
        return self._factors[entry]

    def of(self, priced: PricedStep) -> PricedStep:
        """The step with every operation's price drawn."""
        prices = {}
        for task, price in priced.prices.items():
            prices[task] = price * self.factor(*priced.pricer.uncertainty(task.work, task.name))
        return replace(priced, prices=prices)

    def common(self, priced: PricedStep) -> float:
        """Factor of whole steps, beyond that of their operations."""
        return self.factor("whole steps", priced.pricer.common_spread)


def predict(
    priced: PricedStep,
    *,
    contention: Contention | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    run: Callable[..., StepTimes] = run_simpy,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Intervals of TPOT (mean, median, 99th percentile), of stalls by cause and of lanes' busy time.

    `progress(done, total)` is called after every draw.
    """
    source = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        costs = CostDraw(source)
        times = run(costs.of(priced), contention=contention)
        common = costs.common(priced)
        for name, value in step_numbers(times).items():
            found.setdefault(name, []).append(common * value)
        if progress is not None:
            progress(draw + 1, draws)
    intervals = {name: interval_of(values) for name, values in found.items()}
    return Prediction(intervals, known_share(priced))


def with_intervals(
    result: Result,
    priced: PricedStep,
    *,
    run: Callable[..., StepTimes] = run_simpy,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """The result of running `priced`, with intervals of its times and of what follows from its TPOT."""
    found = predict(priced, run=run, progress=progress)
    a_second = {"tokens_per_s": result.tokens_per_s, "h2d_utilisation": result.h2d_utilisation}
    of_a_step = {name: value * result.tpot_s for name, value in a_second.items() if value is not None}
    known = found.intervals | rates(found.intervals["tpot_s"], **of_a_step)
    spans = {name: (interval.low, interval.high) for name, interval in known.items()}
    return result.with_fields(intervals=spans, interval_share=found.known_share)


def interval_of(values: Sequence[float]) -> Interval:
    """Of a number's draws; values may be infinite.

    Between order statistics i and j of n draws lies (j - i) / (n + 1) of the distribution, on average.
    """
    tail = 50 * (1 - LEVEL)
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(values, [tail, 100 - tail], method="weibull").tolist()
    # between two infinite ones there is nothing to interpolate
    return Interval(*(math.inf if math.isnan(one) else one for one in (low, high)))


def rates(tpot: Interval, **per_step: float) -> dict[str, Interval]:
    """Intervals of numbers that are so much a step over the step's time: tokens a second, a link's use."""
    return {name: Interval(amount / tpot.high, amount / tpot.low) for name, amount in per_step.items()}


def step_numbers(times: StepTimes) -> dict[str, float]:
    """The numbers of a run that have intervals, seconds."""
    numbers = {"tpot_s": float(times.seconds.mean()), "tpot_p50_s": float(np.median(times.seconds))}
    numbers["tpot_p99_s"] = float(np.percentile(times.seconds, 99))
    numbers |= {f"stall_s.{cause.value}": float(gap.mean()) for cause, gap in times.gaps.items()}
    return numbers | {f"lane_busy_s.{lane.value}": float(busy.mean()) for lane, busy in times.lane_busy.items()}


def _factor(source: np.random.Generator, spread: float) -> float:
    """Log-normal with mean 1 and relative standard deviation `spread`."""
    variance = float(np.log1p(spread**2))
    return float(np.exp(source.normal(-variance / 2, np.sqrt(variance))))


def known_share(priced: PricedStep) -> float:
    """Share of a step's busy time on costs whose spread is known."""
    seconds: NDArray[np.float64] = np.zeros(2)
    for task, places in priced.shape.places.items():
        price = priced.prices[task]
        total = np.sum(price) / np.size(price) * len(places.layers)
        _, spread = priced.pricer.uncertainty(task.work, task.name)
        seconds += (total, total if spread else 0.0)
    return float(seconds[1] / seconds[0]) if seconds[0] else 0.0
