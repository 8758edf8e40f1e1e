"""Thresholds of reuse: those that reach a hit rate, and those that follow importance."""

from __future__ import annotations

import numpy as np
import pytest
from histories import TAU, history, paper_trace
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny import random_trace, tiny_design

from clo.similarity import Fold, stepwise
from clo.thresholds import anchored_hit_rate, tau_by_importance, tau_for_hit_rate


class TestThresholds:
    def test_anchored_hit_rate_by_hand(self) -> None:
        trace = paper_trace()
        queries = stepwise(trace.queries, 2)
        rate = anchored_hit_rate(queries, Fold(trace, tiny_design(2).gqa_fold), np.full(4, TAU, dtype=np.float32))
        # A: hit, miss, miss; B: three hits; C: hit, miss, hit; D: three misses
        assert rate.tolist() == pytest.approx([1 / 3, 1, 2 / 3, 0])

    @pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
    def test_tau_reaches_the_target_and_the_next_larger_does_not(self, target: float) -> None:
        trace = random_trace(1, steps=40)
        queries, fold = stepwise(trace.queries, 2), Fold(trace, tiny_design(2).gqa_fold)
        tau = tau_for_hit_rate(queries, fold, target)
        assert np.all(anchored_hit_rate(queries, fold, tau) >= target)
        larger = np.asarray(tau + 1 / 4096, dtype=np.float32)
        assert np.all((anchored_hit_rate(queries, fold, larger) < target) | (larger >= 1))

    @pytest.mark.parametrize("target", [0.3, 0.6])
    def test_a_design_reuses_as_often_as_it_aims_to(self, target: float) -> None:
        missed = history(random_trace(1, steps=41), 4, cache="head_reuse", target_hit_rate=target).demand_missed
        assert np.all(1 - missed[1:].mean(axis=0) >= target)


class TestThresholdsByImportance:
    @given(
        st.floats(-1, 1),
        st.floats(0, 2),
        arrays(np.float64, (2, 6), elements=st.floats(0, 8)),
    )
    def test_more_important_heads_never_have_lower_thresholds(
        self, tau: float, power: float, importance: NDArray[np.float64]
    ) -> None:
        found = tau_by_importance(tau, power, importance, 3)
        order = np.argsort(importance.reshape(2, 3, 2).mean(-1), axis=1, kind="stable")
        assert np.all(np.diff(np.take_along_axis(found, order, 1), axis=1) >= -1e-12)
        assert np.all((found >= -1) & (found <= 1))

    def test_by_hand(self) -> None:
        """Four times as important: half the drift. Of mean importance: tau. Nothing at all: any drift."""
        found = tau_by_importance(0.8, 0.5, [[4.0, 4.0, 1.0, 1.0, 0.0, 0.0]], 3)
        np.testing.assert_allclose(found, [[0.9, 0.8, -1.0]])

    @given(st.floats(-1, 2), arrays(np.float64, (2, 4), elements=st.floats(0, 8)))
    def test_without_power_all_are_equal(self, tau: float, importance: NDArray[np.float64]) -> None:
        np.testing.assert_allclose(tau_by_importance(tau, 0.0, importance, 2), np.full((2, 2), tau), atol=1e-12)

    def test_heads_drift_as_far_as_their_importance_lets_them(self) -> None:
        """The replay against a gate written out here."""
        trace = random_trace(1, steps=41)
        found = history(trace, 4, cache="head_reuse", gqa_fold="mean", tau=0.3, tau_importance_power=1.0).demand_missed
        of_group = np.asarray(trace.head_importance, dtype=np.float64).reshape(len(found[0]), -1).mean(-1)
        tau = np.clip(1 - 0.7 / of_group, -1, 2)
        queries = np.asarray(trace.queries, dtype=np.float64)
        queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
        queries = queries.reshape(len(queries), len(tau), -1, queries.shape[-1])
        anchor = np.zeros_like(queries[0])
        for step, query in enumerate(queries):
            missed = (query * anchor).sum(-1).mean(-1) < tau if step else np.ones(len(tau), dtype=bool)
            np.testing.assert_array_equal(found[step], missed)
            anchor[missed] = query[missed]
