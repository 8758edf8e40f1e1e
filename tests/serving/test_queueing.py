"""The service against queueing theory, and what keeps up with its load."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from toy_service import times_in_system, toy_costs, trace_of

from clo_sim.serving import (
    ServiceRun,
    ServiceSettings,
    generate,
    serve,
    summarise_service,
)
from clo_sim.serving.stability import judge, mean_in_system

STEPS = 1000
"""Decode steps of a mean service time: a millisecond each, so that service takes a second."""


T99 = 2.861
"""Student's t, 19 degrees of freedom, two-sided 99%."""


def queue(load: float, *, servers: int = 1, gpus: int = 1, exponential: bool = True, seed: int = 1) -> ServiceRun:
    """Poisson arrivals; a request decodes for a second on average, `servers` at a time on each of `gpus` workers."""
    rng = np.random.default_rng(seed)
    draws = rng.exponential(STEPS, 60_000) if exponential else np.full(1, STEPS)
    lengths = [(1, 1 + max(1, round(draw))) for draw in draws.tolist()]
    trace = generate("poisson", rate_per_s=load, num_requests=42_000, lengths=lengths, seed=seed)
    return serve(trace, toy_costs(), ServiceSettings(max_batch=servers, gpus=gpus, routing="round_robin"))


def erlang_c(servers: int, offered: float) -> float:
    """Chance to wait (Erlang's second formula)."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


def erlang2_sigma(rate: float) -> float:
    """Root in (0, 1) of sigma = A*(1 - sigma) for Erlang-2 gaps with stages of this rate, service rate 1 (GI/M/1)."""
    sigma = 0.5
    for _ in range(500):
        sigma = (rate / (rate + 1 - sigma)) ** 2
    return sigma


class TestQueueingTheory:
    @pytest.mark.parametrize(
        ("name", "run", "mean_s"),
        [
            ("M/M/1", lambda: queue(0.6), 1 / (1 - 0.6)),
            ("M/D/1", lambda: queue(0.7, exponential=False), 1 + 0.7 / (2 * (1 - 0.7))),
            ("M/M/3", lambda: queue(2.1, servers=3), 1 + erlang_c(3, 2.1) / (3 - 2.1)),
            # Poisson arrivals dealt out in turn to two workers: each sees Erlang-2 gaps
            ("E2/M/1", lambda: queue(1.2, gpus=2), 1 / (1 - erlang2_sigma(1.2))),
        ],
    )
    def test_mean_time_in_system(self, name: str, run: Any, mean_s: float) -> None:
        batches = times_in_system(run())[2000:].reshape(20, -1).mean(axis=1)
        half_width = T99 * batches.std(ddof=1) / math.sqrt(20)
        assert abs(batches.mean() - mean_s) < half_width, (name, batches.mean(), mean_s, half_width)
        assert half_width < 0.12 * mean_s, "too wide to tell anything"

    def test_a_share_of_the_time_is_busy(self) -> None:
        result = summarise_service(queue(0.6))
        assert result.busy_share == pytest.approx(0.6, rel=0.02)
        assert result.unstable is False

    @pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
    def test_what_keeps_up_is_stable(self, load: float) -> None:
        assert summarise_service(queue(load, seed=5)).unstable is False

    def test_what_does_not_keep_up_has_no_latency(self) -> None:
        result = summarise_service(queue(1.25))
        assert result.unstable is True
        assert result.ttft_s.p95 is None
        assert result.e2e_s.mean is None
        assert result.tpot_s.p95 is not None
        # of 1.25 requests a second 0.25 stay behind: a fifth
        assert result.excess_share == pytest.approx(0.2, rel=0.15)

    def test_few_requests_tell_nothing(self) -> None:
        trace = trace_of([(number, 1, 2) for number in range(50)])
        assert summarise_service(serve(trace, toy_costs(), ServiceSettings())).unstable is None


def test_of_a_steady_load_the_excess_stays_behind() -> None:
    # one comes every 800 ns, one leaves every 1000: of 1.25 requests 0.25 stay
    arrival = np.arange(10_000) * 800
    found = judge(arrival, (np.arange(10_000) + 1) * 1000)
    assert found.unstable is True
    assert found.excess_share == pytest.approx(0.2, rel=1e-3)


def test_backlog_is_averaged_over_time() -> None:
    arrival, finish = np.array([0, 10, 20]), np.array([30, 15, 40])
    edges = np.array([0.0, 10.0, 20.0, 40.0])
    assert mean_in_system(arrival, finish, edges).tolist() == [1.0, 1.5, 1.5]


def test_a_burst_that_drains_is_no_trend() -> None:
    arrival = np.sort(np.concatenate([np.arange(1000) * 1000, np.full(300, 300_000)]))
    finish = np.maximum.accumulate(arrival + 100) + np.where(arrival == 300_000, 50_000, 0)
    assert judge(arrival, finish).unstable is False
