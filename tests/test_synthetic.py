"""The synthetic workload keeps what it was fitted to, and its closed forms are right. Small traces but for one test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clo import presets
from clo.trace import AttentionTrace
from clo.trace_stats import describe
from clo_sim.synthetic import Drift, _decay, correlation_of_overlap, fit_drift, fit_synthetic

Pair = tuple[AttentionTrace, AttentionTrace]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The committed trace, and one generated after it."""
    trace = presets.load_trace()
    return trace, fit_synthetic(trace).generate(num_steps=128, seed=3)


@pytest.mark.parametrize("lag", ["1", "4", "16", "64"])
def test_cosines_at_every_distance_are_kept(pair: Pair, lag: str) -> None:
    recorded, generated = (describe(trace)["cosine_at_lag"][lag] for trace in pair)
    assert generated == pytest.approx(recorded, abs=0.04)


@pytest.mark.parametrize("selector", ["exact", "page_minmax"])
def test_overlap_of_adjacent_sets_is_kept_at_the_fitted_budget(pair: Pair, selector: str) -> None:
    recorded, generated = (describe(trace)["adjacent_overlap"][selector]["32"] for trace in pair)
    assert generated == pytest.approx(recorded, abs=0.04)


@pytest.mark.parametrize("distance", ["1", "2"])
def test_predicted_pages_agree_as_often(pair: Pair, distance: str) -> None:
    recorded, generated = (describe(trace)["lookahead_overlap"]["page_minmax"][distance]["32"] for trace in pair)
    assert generated == pytest.approx(recorded, abs=0.04)


def test_same_seed_same_trace_and_another_seed_another() -> None:
    fitted = fit_synthetic(presets.load_trace())
    first, again, other = (fitted.generate(num_steps=4, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.queries, again.queries)
    np.testing.assert_array_equal(first.pages["exact"], again.pages["exact"])
    assert not np.array_equal(first.pages["exact"], other.pages["exact"])


def test_it_tells_how_far_it_is() -> None:
    told: list[tuple[int, int]] = []
    fit_synthetic(presets.load_trace()).generate(num_steps=3, progress=lambda *now: told.append(now))
    # three steps for each of two selectors
    assert told == [(done, 6) for done in range(1, 7)]


def test_longer_contexts_have_more_candidates_and_larger_budgets() -> None:
    fitted = fit_synthetic(presets.load_trace())
    header = fitted.generate(num_steps=3, context_tokens=8192).header
    assert header.context_tokens == 8192
    assert header.max_budget_pages == 2 * presets.load_trace().header.max_budget_pages


@given(rho=st.floats(0.3, 0.99), drifting=st.floats(0.05, 0.6), level=st.floats(0.0, 0.4))
@settings(max_examples=50, deadline=None)
def test_fit_recovers_a_law_of_its_own_family_nearly(rho: float, drifting: float, level: float) -> None:
    lags = [1, 2, 4, 8, 16, 32, 64]
    law = Drift(drifting=np.array([drifting]), fresh=np.array([1 - level - drifting]), rho=np.array([rho]))
    values = np.stack([law.value(lag) for lag in lags])
    fitted = fit_drift(lags, values)
    error = max(abs(float(fitted.value(lag)[0] - law.value(lag)[0])) for lag in lags)
    # rho comes from a grid of nine: the law must be met, not the parameters
    assert error < 0.06


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("correlation", [0.2, 0.6, 0.9])
def test_overlap_of_correlated_gaussians_against_the_bivariate_normal(share: float, correlation: float) -> None:
    cut = stats.norm.ppf(1 - share)
    both = stats.multivariate_normal(cov=[[1, correlation], [correlation, 1]]).cdf([-cut, -cut])
    found = correlation_of_overlap(np.array([both / share]), share)
    assert float(found[0]) == pytest.approx(correlation, abs=0.02)


def test_random_clock_keeps_the_mean_decay() -> None:
    shape, rho = np.array([0.7, 3.0, 20.0]), np.array([0.5, 0.9, 0.97])
    clock = np.random.default_rng(0).gamma(shape, 1 / shape, size=(200_000, 3))
    np.testing.assert_allclose(_decay(rho, clock, shape).mean(axis=0), rho, atol=0.004)
