"""Prices of prefill and decode steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_service import toy_costs, trace_of

import clo_sim
from clo import presets
from clo_sim.serving import (
    worker_costs,
)
from clo_sim.serving.prefill_attention import pairs_of


class TestPrices:
    def test_chunks_of_a_prompt_add_up(self) -> None:
        assert sum(pairs_of(start, 16) for start in range(0, 160, 16)) == pairs_of(0, 160)
        prices = toy_costs(token_ns=7, chunk_tokens=10).prefill
        assert prices.alone_ns(35) == 35 * 7
        assert prices.alone_ns(35, 30) == 5 * 7

    def test_more_device_memory_makes_steps_faster(self) -> None:
        trace = trace_of([(0, 65536, 10)])
        scene = clo_sim.make_scene()
        gpu = scene.machine.gpu.model_copy(update={"memory_bytes": 60e9})
        less = replace(scene, machine=scene.machine.model_copy(update={"gpu": gpu}))
        slow, fast = (worker_costs(one, presets.load_design("resolve"), trace).clock(8) for one in (less, scene))
        assert slow.total(60_000, 1) > 1.05 * fast.total(60_000, 1)

    @pytest.mark.parametrize(("name", "batch", "context"), [("resident", 3, 3000), ("clo", 6, 24_000)])
    def test_between_priced_points_the_executor_agrees(self, name: str, batch: int, context: int) -> None:
        costs = worker_costs(clo_sim.make_scene(), presets.load_design(name), trace_of([(0, 65536, 10)]))
        assert costs.decode_prices is not None
        real = costs.decode_prices.seconds(batch, context)
        assert costs.clock(batch).total(context, 1) / 1e9 == pytest.approx(real, rel=0.03)

    def test_prefill_is_no_faster_than_arithmetic_and_links_allow(self) -> None:
        scene = clo_sim.make_scene()
        costs = worker_costs(scene, presets.load_design("clo"), trace_of([(0, 4096, 10)]))
        model, tokens = scene.model, 65_536
        flops = 2 * tokens * model.num_layers * model.layer_weight_values(0)
        flops += 4 * model.num_layers * model.num_query_heads * model.head_dim * tokens**2 / 2
        assert costs.prefill.alone_ns(tokens) / 1e9 > flops / scene.machine.gpu.peak_flops_per_s
