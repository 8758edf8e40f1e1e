"""Traffic of layers from what the heads of a trace ask for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from histories import history
from tiny import random_trace, tiny_design, tiny_scene

from clo.plan import make_plan
from clo.traffic import Traffic
from clo_sim.stand_in import TrafficSource


class TestTraffic:
    """From heads to layers: sums are the direct sums, whatever the detour."""

    def test_own_model_at_batch_one_is_the_direct_sum(self) -> None:
        trace = random_trace(2)
        scene = tiny_scene(trace)
        plan = scene.plan(tiny_design(4, cache="lru", slot_pages=6))
        traffic = scene.source.traffic(plan)
        direct = history(trace, 4, cache="lru", slot_pages=6).demand_pages.reshape(6, 3, 2).sum(axis=2)
        np.testing.assert_array_equal(traffic.demand_pages, direct)
        assert traffic.hit_rate == pytest.approx(1 - direct.sum() / (6 * 3 * 2 * 4))

    def test_a_context_twice_as_long_moves_twice_the_pages(self) -> None:
        # equal shares of the context are kept and attended: 8 of 32 pages where 4 of 16 were recorded
        trace = random_trace(2)
        small = tiny_scene(trace)
        workload = small.workload.with_fields(context_tokens=128)
        design = tiny_design(8, cache="lru", slot_pages=12, prefetch_depth=1)
        long = small.source.traffic(make_plan(small.model, small.machine, design, workload))
        recorded = history(trace, 4, cache="lru", slot_pages=6, prefetch_depth=1)
        np.testing.assert_array_equal(long.demand_pages.sum(axis=1), 2 * recorded.demand_pages.sum(axis=1))
        np.testing.assert_array_equal(long.spec_pages.sum(axis=1), 2 * recorded.spec_pages.sum(axis=1))
        # heads are heads, however long their context
        np.testing.assert_array_equal(long.demand_heads.sum(axis=1), recorded.demand_missed.sum(axis=1))

    def test_batch_scales_the_mean(self) -> None:
        trace = random_trace(3, steps=16)
        scene = tiny_scene(trace, batch=8)
        design = tiny_design(4, cache="lru")
        one = tiny_scene(trace).source.traffic(tiny_scene(trace).plan(design)).demand_pages
        eight = scene.source.traffic(scene.plan(design)).demand_pages
        # rotating the steps of a sequence keeps its total
        assert eight.sum() == pytest.approx(8 * one.sum())

    def test_resampled_heads_move_what_the_recorded_ones_do_in_expectation(self) -> None:
        # five layers of four heads over three recorded layers: model layer 0, at depth 0, draws from recorded layers 0
        # and 1, layer 2 from all, layer 4 from 1 and 2; each of these heads is as likely
        trace = random_trace(6, steps=16)
        small = tiny_scene(trace)
        moved = history(trace, 4, cache="lru").demand_pages.mean(axis=0).reshape(3, 2)
        batch = 400
        model = small.model.with_fields(num_layers=5, num_query_heads=4, num_kv_heads=4)
        workload = small.workload.with_fields(batch=batch)
        plan = make_plan(model, small.machine, tiny_design(4, cache="lru"), workload)
        found = small.source.traffic(plan).demand_pages.mean(axis=0) / (4 * batch)
        for layer, sources in ((0, [0, 1]), (2, [0, 1, 2]), (4, [1, 2])):
            candidates = moved[sources]
            # five standard errors of the mean of 1600 draws
            error = 5 * candidates.std() / math.sqrt(4 * batch)
            assert found[layer] == pytest.approx(candidates.mean(), abs=error + 1e-9), layer

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("cache", ["none", "lru", "head_reuse"])
    def test_nothing_is_predicted_for_the_first_layers(self, cache: str, depth: int) -> None:
        traffic = self.resampled(cache, depth, dense_layers=depth)
        assert np.all(traffic.spec_pages[:, depth:].sum(axis=0) > 0)
        assert not traffic.fetched_pages[:, :depth].any()

    @pytest.mark.parametrize(("cache", "depth"), [("none", 1), ("none", 2), ("lru", 1), ("head_reuse", 1)])
    def test_nothing_is_predicted_for_the_first_layers_without_dense_ones(self, cache: str, depth: int) -> None:
        traffic = self.resampled(cache, depth, dense_layers=0)
        assert not traffic.spec_pages[:, :depth].any()
        if cache == "none":
            assert not traffic.demand_pages[:, depth:].any()

    def resampled(self, cache: str, depth: int, dense_layers: int) -> Traffic:
        trace = random_trace(7)
        small = tiny_scene(trace, batch=4)
        changes: dict[str, Any] = {"slot_pages": None} if cache == "none" else {}
        design = tiny_design(4, cache=cache, prefetch_depth=depth, dense_layers=dense_layers, **changes)
        return small.source.traffic(
            make_plan(small.model.with_fields(num_layers=6), small.machine, design, small.workload)
        )

    def test_pinned_heads_move_nothing(self) -> None:
        trace = random_trace(4)
        scene = tiny_scene(trace)
        half = scene.source.traffic(scene.plan(tiny_design(4, cache="lru", pinned_head_fraction=0.5)))
        moved = history(trace, 4, cache="lru").demand_pages.reshape(6, 3, 2)
        # of each layer's two heads the one that moves less stays on the host
        assert half.demand_pages.sum() == moved.sum(axis=0).min(axis=1).sum()
        none = scene.source.traffic(scene.plan(tiny_design(4, cache="lru", pinned_head_fraction=1.0)))
        assert none.demand_pages.sum() == 0

    def test_same_seed_same_traffic_and_another_seed_another(self) -> None:
        trace = random_trace(5, steps=16)
        scene = tiny_scene(trace, batch=4)
        model = scene.model.with_fields(num_layers=5)
        design = tiny_design(4, cache="lru")

        def pages(seed: int) -> Any:
            workload = scene.workload.with_fields(seed=seed)
            return TrafficSource(trace).traffic(make_plan(model, scene.machine, design, workload)).demand_pages

        np.testing.assert_array_equal(pages(1), pages(1))
        assert not np.array_equal(pages(1), pages(2))
