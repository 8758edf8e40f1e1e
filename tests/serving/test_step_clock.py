"""Sums of decode steps are those of the steps one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clo_sim.serving.clocks import StepClock

steps = st.lists(st.integers(1, 10_000), min_size=1, max_size=20)


class TestStepClock:
    @given(steps, st.integers(0, 5), st.integers(0, 700), st.integers(1, 300))
    def test_many_steps_take_what_they_take_one_by_one(
        self, values: list[int], shift: int, context: int, count: int
    ) -> None:
        clock = StepClock.of(values, shift=shift)
        alone = [values[min((context + one) >> shift, len(values) - 1)] for one in range(count)]
        assert clock.total(context, count) == sum(alone)
        spread = [step for step, times in clock.pieces(context, count) for _ in range(times)]
        assert spread == alone

    @given(steps, st.integers(0, 5), st.integers(0, 700), st.integers(1, 10**6))
    def test_the_fewest_steps_that_pass_a_time(
        self, values: list[int], shift: int, context: int, nanoseconds: int
    ) -> None:
        clock = StepClock.of(values, shift=shift)
        count = clock.steps_to_pass(context, nanoseconds)
        assert clock.total(context, count) >= nanoseconds
        assert count == 1 or clock.total(context, count - 1) < nanoseconds
