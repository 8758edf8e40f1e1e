"""Objectives and bounds: which designs nobody beats, and which are allowed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from questions import CLO

from clo.errors import SpecError
from clo_sim.evaluation import METRICS, Evaluation
from clo_sim.goals import LARGER_IS_BETTER, Bound, Goals
from clo_sim.variation import Task


def made_up(**metrics: float) -> Evaluation:
    return Evaluation(task=Task(design=CLO), metrics={**dict.fromkeys(METRICS, 1.0), **metrics})


EVALUATIONS = st.lists(
    st.builds(made_up, tpot_s=st.integers(1, 5), overlap=st.integers(1, 5), kv_device_bytes=st.integers(1, 5)),
    max_size=12,
)


class TestGoals:
    @given(EVALUATIONS, st.lists(st.sampled_from(["tpot_s", "overlap", "kv_device_bytes"]), min_size=1, unique=True))
    def test_the_front_by_its_definition(self, evaluations: list[Evaluation], objectives: list[str]) -> None:
        goals = Goals(objectives=tuple(objectives), bounds=(Bound.parse("kv_device_bytes<=4"),))
        allowed = [one for one in evaluations if one.metrics["kv_device_bytes"] <= 4]

        def costs(one: Evaluation) -> tuple[float, ...]:
            return tuple(one.metrics[name] * (-1 if name in LARGER_IS_BETTER else 1) for name in objectives)

        def beaten(one: Evaluation) -> bool:
            return any(
                costs(other) != costs(one) and all(a <= b for a, b in zip(costs(other), costs(one), strict=True))
                for other in allowed
            )

        expected = {costs(one) for one in allowed if not beaten(one)}
        front = goals.front(evaluations)
        assert {costs(one) for one in front} == expected
        assert len(front) == len(expected)
        ranked = goals.ranked(evaluations)
        assert Counter(map(id, ranked)) == Counter(map(id, allowed))
        assert {costs(one) for one in ranked[: len(front)]} == expected

    @given(st.floats(-10, 10), st.floats(-10, 10))
    def test_a_bound_is_broken_by_a_positive_excess(self, value: float, bound: float) -> None:
        one = made_up(overlap=value)
        assert (Bound("overlap", bound, True).excess(one) <= 0) == (value >= bound)
        assert (Bound("overlap", bound, False).excess(one) <= 0) == (value <= bound)

    @pytest.mark.parametrize("text", ["overlap", "overlap=0.9", "speed>=1", "overlap>=high", "overlp>=1"])
    def test_bad_bounds_are_refused(self, text: str) -> None:
        with pytest.raises(SpecError):
            Bound.parse(text)
