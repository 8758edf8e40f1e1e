"""What share of the datasheet rate prefill attention reaches: fitted from measurements, used in prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fitted_costs import assert_same
from hypothesis import given
from hypothesis import strategies as st
from needs import needs_measurements

import clo_sim
from clo import presets
from clo.profile import PREFILL_ATTENTION, Source
from clo_calibration.tables import measurements
from clo_calibration.tables.measurements import Samples
from clo_calibration.tables.prefill import WITHOUT_LATENT, attention_cost, causal_flops, prefill_costs
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices

LABELS = {"kernels": ("fast",), "framework_version": "vllm 1"}


def prompts(shares: list[float], *, heads: float = 32.0, tokens: float = 16384.0) -> Samples:
    """Prompts whose attention reached these shares of 1e15 flop/s, keys and values of 128."""
    points = np.array([[1.0 + n, heads, tokens] for n in range(len(shares))])
    seconds = causal_flops(points, 256) / (np.array(shares) * 1e15)
    return Samples(points=points, seconds=seconds, labels=LABELS)


class TestFit:
    def test_flops_are_those_of_a_causal_mask(self) -> None:
        # sequences, heads, tokens; each token and those before it, half a pair for itself; key and value of 3 + 5
        pairs = sum(before + 0.5 for before in range(7))
        assert causal_flops(np.array([[2.0, 4.0, 7.0]]), 3 + 5) == pytest.approx([2 * 4 * pairs * 2 * (3 + 5)])

    @given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=9))
    def test_the_median_share_and_its_spread(self, shares: list[float]) -> None:
        cost = attention_cost(prompts(shares), 256, 1e15)
        assert cost.efficiency == pytest.approx(np.median(shares), abs=1e-4)
        assert cost.spread == pytest.approx(np.std(shares) / np.mean(shares), abs=1e-4)
        assert (cost.samples, cost.source) == (len(shares), Source.AICONFIGURATOR)

    def test_short_prompts_and_few_heads_do_not_count(self) -> None:
        parts = [prompts([0.5]), prompts([0.1], heads=4.0), prompts([0.1], tokens=4096.0)]
        points, seconds = (np.concatenate([getattr(part, name) for part in parts]) for name in ("points", "seconds"))
        cost = attention_cost(Samples(points=points, seconds=seconds, labels=LABELS), 256, 1e15)
        assert (cost.efficiency, cost.samples) == (0.5, 1)


@needs_measurements
@pytest.mark.parametrize("gpu", list(measurements.GPUS))
def test_shipped_shares_are_those_of_the_measurements(gpu: str) -> None:
    profile, found = presets.load_named_profile(gpu), prefill_costs(gpu)
    assert_same(profile.prefill_attention, found["prefill_attention"])
    latent = found.get("prefill_latent_attention", PREFILL_ATTENTION)
    assert_same(profile.prefill_latent_attention, latent)
    assert (latent == PREFILL_ATTENTION) == (gpu in WITHOUT_LATENT)


class TestPrefill:
    @staticmethod
    def scene(machine: str = "h200", model: str = "llama-3-8b") -> Scene:
        return clo_sim.make_scene(model, machine, context_tokens=8192, batch=1)

    @pytest.mark.parametrize(
        ("model", "entry"),
        [("llama-3-8b", "prefill_attention"), ("deepseek-v2-lite", "prefill_latent_attention")],
    )
    def test_half_the_share_takes_twice_as_long(self, model: str, entry: str) -> None:
        scene, design = self.scene(model=model), presets.load_design("clo")
        cost = getattr(scene.profile, entry)
        slower = cost.model_copy(update={"efficiency": cost.efficiency / 2})
        halved = replace(scene, profile=scene.profile.model_copy(update={entry: slower}))
        fast, slow = (prefill_prices(one, design, chunk_tokens=64) for one in (scene, halved))
        assert slow.pair_ns == pytest.approx(2 * fast.pair_ns)
        assert slow.dense_ns == fast.dense_ns

    @pytest.mark.parametrize(("machine", "measured"), [("h200", True), ("gh200", False), ("a40", False)])
    def test_on_another_gpu_it_was_not_measured(self, machine: str, measured: bool) -> None:
        prices = prefill_prices(self.scene(machine), presets.load_design("clo"), chunk_tokens=64)
        assert prices.attention_measured is measured

    def test_the_literature_is_no_measurement(self) -> None:
        scene = self.scene()
        profile = scene.profile.model_copy(update={"prefill_attention": PREFILL_ATTENTION})
        prices = prefill_prices(replace(scene, profile=profile), presets.load_design("clo"), chunk_tokens=64)
        assert not prices.attention_measured
