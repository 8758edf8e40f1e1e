"""What linear attention takes, fitted from timed kernels: known costs are found again, and caches leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
from fitted_costs import assert_same
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_measurements

from clo import presets
from clo.profile import LINEAR_ATTENTION, PREFILL_LINEAR_ATTENTION, Source
from clo_calibration.tables import measurements
from clo_calibration.tables.linear import (
    LARGE_BYTES,
    SMALL_BYTES,
    decode_cost,
    linear_costs,
    moved_bytes,
    prefill_cost,
)
from clo_calibration.tables.measurements import Samples

LABELS = {"kernels": ("fast",), "framework_version": "vllm 1"}
BANDWIDTH = 4e12
STEPS = np.array([(batch, 16.0, heads) for heads in (16.0, 48.0) for batch in (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)])
PROMPTS = np.array([(tokens, 4.0, heads) for heads in (4.0, 16.0, 64.0) for tokens in (256.0, 1024.0, 4096.0, 32768.0)])


def samples(points: np.ndarray, seconds: np.ndarray) -> Samples:  # type: ignore[type-arg]
    return Samples(points=points, seconds=seconds, labels=LABELS)


@given(latency_s=st.floats(1e-6, 1e-4), efficiency=st.floats(0.1, 1.0), cached=st.floats(0.1, 1.0))
def test_a_rate_that_no_cache_helped_is_found_again(latency_s: float, efficiency: float, cached: float) -> None:
    states = STEPS[:, 0] * STEPS[:, 2] * 4 * 128**2
    moving_s = moved_bytes(STEPS) / (efficiency * BANDWIDTH)
    small, large = states <= SMALL_BYTES, states >= LARGE_BYTES
    assert small.any()
    assert large.any()
    # the smallest take no time but their latency, those between come out of a cache, as fast as that may be
    seconds = latency_s + np.where(large, moving_s, np.where(small, 0.0, cached * moving_s))
    cost = decode_cost(samples(STEPS, seconds), BANDWIDTH)
    assert cost.latency_s == pytest.approx(latency_s)
    assert cost.efficiency == pytest.approx(efficiency, abs=1e-4)
    assert cost.spread < 1e-3


def test_states_that_a_benchmark_reads_in_bf16_are_fewer_bytes() -> None:
    states = STEPS[:, 0] * STEPS[:, 2] * 4 * 128**2
    moved = moved_bytes(STEPS, narrow_in=True)
    np.testing.assert_allclose(moved_bytes(STEPS) - moved, states / 2)
    seconds = 1e-5 + np.where(states <= SMALL_BYTES, 0.0, moved / (0.8 * BANDWIDTH))
    older = LABELS | {"kernels": ("causal_conv1d_update", "fused_recurrent_gated_delta_rule")}
    cost = decode_cost(Samples(points=STEPS, seconds=seconds, labels=older), BANDWIDTH)
    assert cost.efficiency == pytest.approx(0.8, abs=1e-4)


def test_bytes_of_a_step_by_hand() -> None:
    # states in and out, the last three tokens in and out, the new one in, convolved, and its output
    state, conv = 48 * 128 * 128 * 4, (16 + 16 + 48) * 128 * 2
    expected = 4 * (2 * (state + 3 * conv) + 2 * conv + 48 * 128 * 2)
    assert moved_bytes(np.array([(4.0, 16.0, 48.0)])) == [expected]


@given(st.floats(0.0, 1e-4), st.floats(1e-9, 1e-7), st.floats(1e-11, 1e-8))
def test_the_costs_of_a_prompt_are_found_again(latency_s: float, per_token_s: float, per_head_token_s: float) -> None:
    tokens, _, heads = PROMPTS.T
    seconds = latency_s + tokens * (per_token_s + heads * per_head_token_s)
    cost = prefill_cost(samples(PROMPTS, seconds))
    assert cost.samples == (tokens >= 1024).sum()
    np.testing.assert_allclose([cost.seconds(*each) for each in zip(tokens, heads, strict=True)], seconds, rtol=1e-4)


@needs_measurements
@pytest.mark.parametrize("gpu", measurements.GPUS)
def test_shipped_profiles_have_what_was_measured(gpu: str) -> None:
    profile, found = presets.load_named_profile(gpu), linear_costs(gpu)
    assert_same(profile.linear_attention, found["linear_attention"])
    assert_same(profile.prefill_linear_attention, found.get("prefill_linear_attention", PREFILL_LINEAR_ATTENTION))
    assert profile.linear_attention.source is Source.AICONFIGURATOR
    # a kernel that seems to need all of the memory's rate moves less than was counted
    assert 0.75 < profile.linear_attention.efficiency < 0.92
    assert ("prefill_linear_attention" in found) == (gpu != "a100")


@needs_measurements
def test_states_that_no_cache_holds_are_foretold() -> None:
    cost, measured = linear_costs("h200")["linear_attention"], measurements.read_linear_decode("h200")
    large = measured.points[:, 0] * measured.points[:, 2] * 4 * 128**2 >= LARGE_BYTES
    moved = moved_bytes(measured.points[large])
    foretold = cost.latency_s + moved / (cost.efficiency * 4.8e12)  # type: ignore[attr-defined]
    assert np.abs(foretold / measured.seconds[large] - 1).max() < 0.05
    # with nothing known of this GPU it is priced about the same
    assert LINEAR_ATTENTION.efficiency == pytest.approx(cost.efficiency, abs=0.01)  # type: ignore[attr-defined]
    assert LINEAR_ATTENTION.latency_s == pytest.approx(cost.latency_s, rel=0.01)  # type: ignore[attr-defined]
