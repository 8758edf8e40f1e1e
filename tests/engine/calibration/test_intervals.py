"""Prediction intervals: what is drawn, and what follows from known spreads."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from clo.engine.measure import MachineRun
from clo.operation_costs import (
    OperationProfile,
)
from clo_calibration.comparison import price_run
from clo_sim.intervals import Interval, predict, rates
from clo_sim.simulator import run_simpy


class TestIntervals:
    def test_nine_in_ten_outcomes_are_inside(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        """As many draws as are made by default, of a distribution that is known: log-normal with mean 1."""
        priced = price_run(profile.model_copy(update={"common_spread": 0.1}), runs["resident"][1])
        times, sigma = run_simpy(priced), float(np.sqrt(np.log1p(0.01)))
        middle = float(times.seconds.mean())

        def share(seed: int) -> float:
            found = predict(priced, seed=seed, run=lambda *_, **__: times).intervals["tpot_s"]
            ends = [(np.log(end / middle) + sigma**2 / 2) / sigma for end in (found.low, found.high)]
            return NormalDist().cdf(ends[1]) - NormalDist().cdf(ends[0])

        assert np.mean([share(seed) for seed in range(200)]) == pytest.approx(0.9, abs=0.012)

    def test_no_spread_gives_points(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        still = {key: cost.model_copy(update={"spread": 0.0}) for key, cost in profile.operations.items()}
        priced = price_run(profile.model_copy(update={"operations": still}), runs["clo"][1])
        told: list[tuple[int, int]] = []
        found = predict(priced, draws=4, progress=lambda *now: told.append(now))
        assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
        interval = found.intervals["tpot_s"]
        assert interval.low == interval.high == pytest.approx(float(run_simpy(priced).seconds.mean()))
        assert found.known_share == 0.0

    def test_a_common_spread_alone_gives_its_quantiles(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        still = {key: cost.model_copy(update={"spread": 0.0}) for key, cost in profile.operations.items()}
        priced = price_run(profile.model_copy(update={"operations": still, "common_spread": 0.1}), runs["clo"][1])
        middle = float(run_simpy(priced).seconds.mean())
        interval = predict(priced, draws=2000).intervals["tpot_s"]
        assert interval.low / middle == pytest.approx(np.exp(-1.645 * 0.0998 - 0.005), rel=0.02)
        assert interval.high / middle == pytest.approx(np.exp(1.645 * 0.0998 - 0.005), rel=0.02)

    def test_more_spread_is_wider_and_the_same_seed_the_same(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        def width(spread: float) -> float:
            costs = {key: cost.model_copy(update={"spread": spread}) for key, cost in profile.operations.items()}
            priced = price_run(profile.model_copy(update={"operations": costs}), runs["resolve"][1])
            interval = predict(priced, draws=30).intervals["tpot_s"]
            assert interval == predict(priced, draws=30).intervals["tpot_s"]
            return interval.high - interval.low

        assert width(0.05) < width(0.3)

    def test_a_rate_is_high_where_the_step_is_short(self) -> None:
        assert rates(Interval(0.02, 0.05), tokens_per_s=4.0) == {"tokens_per_s": Interval(80.0, 200.0)}
