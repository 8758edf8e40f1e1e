"""Models whose KV heads attend to blocks that an indexer chooses (MiniMax-M3): shape, plan, step, prices, prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NO_TRAFFIC, random_trace, tiny_machine, tiny_model

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.placement import hosted_token_bytes
from clo.plan import make_plan
from clo.pricing import Pricer
from clo.profile import IndexerCost, Source
from clo.schedule import Lane, record_step
from clo.schedule.work import Amount, IndexTokens
from clo.specs import Design, ModelSpec, Workload
from clo.traffic import Traffic
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices
from clo_sim.stand_in import TrafficSource

M3 = presets.load_model("minimax-m3")
INDEXER = {"num_heads": 2, "head_dim": 3, "top_tokens": 12, "block_tokens": 4, "key_bytes": 6.0}


def block_model(**changes: Any) -> ModelSpec:
    """Two KV heads, each of which attends to three blocks of four tokens."""
    return tiny_model(**{"indexer": INDEXER | changes.pop("indexer", {})} | changes)


def scene_of(gpus: int = 8, *, by: str = "heads", **sizes: int) -> Scene:
    machine = presets.load_machine("h200").with_fields(tensor_parallel=gpus, attention_by=by)
    return clo_sim.make_scene(M3, machine, **{"context_tokens": 32768, "batch": 16} | sizes)


def design_for(name: str, **changes: Any) -> Design:
    return presets.load_design(name, M3).with_fields(**changes)


class TestShape:
    def test_it_is_as_large_as_its_makers_say(self) -> None:
        # model card: 427 B, the layers that predict further tokens and vision apart; 123 kB of KV a token
        assert M3.with_fields(weight_bytes_per_value=2.0).weight_bytes / 2 == pytest.approx(427e9, rel=3e-3)
        assert M3.kv_bytes_per_token == 60 * 4 * 128 * 2 * 2

    def test_weights_of_the_indexer_are_its_projection(self) -> None:
        plain = tiny_model().all_attention_weight_values
        one = (2 * 3 + 3) * 4  # two heads' queries and the key, from a hidden state of four values
        assert block_model().all_attention_weight_values == plain + 2 * one
        assert block_model(indexer={"dense_layers": 1}).all_attention_weight_values == plain + one

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"indexer": {"top_tokens": 10}}, "must be two or more blocks of block_tokens = 4"),
            ({"indexer": {"top_tokens": 4}}, "must be two or more blocks of block_tokens = 4"),
            ({"indexer": {"num_heads": 1}}, "indexer.num_heads = 1 must be num_kv_heads = 2"),
            ({"indexer": {"dense_layers": 2}}, "indexer.dense_layers = 2 must be less than num_layers = 2"),
            ({"indexer": {"dense_layers": 1, "shared_layers": (1,)}}, "1 has nothing to share"),
            ({"windowed_layers": (0,), "window_tokens": 4}, "indexer excludes windowed_layers and linear"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            block_model(**changes)

    @pytest.mark.parametrize("field", [{"block_tokens": 2, "top_tokens": 8}, {"dense_layers": 1}])
    def test_with_latent_attention_single_tokens_are_chosen_everywhere(self, field: dict[str, int]) -> None:
        glm = presets.load_model("glm-5.1")
        with pytest.raises(ValueError, match="with latent attention single tokens are chosen in every layer"):
            glm.with_fields(indexer=glm.indexer.model_dump() | field)  # type: ignore[union-attr]

    @pytest.mark.parametrize(("gpus", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
    def test_a_gpu_has_the_indexers_heads_of_its_kv_heads(self, gpus: int, heads: int) -> None:
        part = M3.shard(gpus)
        assert part.indexer is not None
        assert (part.num_kv_heads, part.indexer.num_heads, part.indexer.key_bytes) == (heads, heads, 256)
        assert M3.shard(gpus, whole_attention=True).indexer == M3.indexer


class TestPlan:
    def test_a_preset_attends_as_the_model_does(self) -> None:
        design = design_for("resolve")
        assert (design.selector, design.page_size, design.budget_pages) == ("indexer", 128, 15)
        assert (design.dense_layers, design.num_sink_tokens, design.recent_window_tokens) == (3, 0, 128)
        plan = scene_of().plan(design)
        assert (plan.num_pages, plan.attended_tokens, plan.dense_layers) == (256, 2048, 3)

    @given(tokens=st.integers(1, 8192))
    def test_a_short_sequence_attends_to_all_there_is(self, tokens: int) -> None:
        assert scene_of(context_tokens=tokens).plan(design_for("resolve")).attended_tokens == min(tokens, 2048)

    @pytest.mark.parametrize(("gpus", "by", "sequences"), [(8, "heads", 16), (4, "heads", 16), (8, "sequences", 2)])
    def test_every_gpu_keeps_a_key_of_every_token_it_attends_to(self, gpus: int, by: str, sequences: int) -> None:
        plan = scene_of(gpus, by=by).plan(design_for("resident-sparse"))
        assert plan.memory.index == 57 * sequences * 32768 * 256

    def test_pages_of_another_selector_hold_as_many_tokens(self) -> None:
        design = presets.load_design("resolve", M3, {"selector": "key_4bit", "page_size": 16})
        assert design.budget_pages == 120  # of 1,920 tokens before the newest block

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"page_size": 16}, "the indexer of minimax-m3 chooses blocks of 128 tokens: set it to 128"),
            ({"dense_layers": 2}, "its indexer chooses in all but its first 3 layers: set it to 3"),
            ({"pinned_head_fraction": 0.5}, "design.pinned_head_fraction = 0.5: minimax-m3 attends to the 2048"),
        ],
    )
    def test_what_the_model_does_not_do_is_refused(self, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            scene_of().plan(design_for("clo", **changes))

    def test_full_attention_is_not_what_it_does(self) -> None:
        with pytest.raises(SpecError, match="attend = full is not what minimax-m3 does"):
            scene_of().plan(design_for("resident"))

    def test_a_kept_token_has_its_keys(self) -> None:
        assert hosted_token_bytes(M3, design_for("resolve")) == M3.kv_bytes_per_token + 57 * 256


class TestStep:
    def test_first_layers_attend_to_everything(self) -> None:
        nodes = record_step(scene_of().plan(design_for("resolve"))).nodes
        names = {
            layer: [node.op.name for node in nodes if node.lane is Lane.MAIN and node.op.layer == layer]
            for layer in (2, 3)
        }
        assert names[2][names[2].index("append_kv") + 1] == "attention"
        chosen = names[3][names[3].index("append_kv") + 1 : names[3].index("attention")]
        assert chosen == ["index_tokens", "resolve_pages", "gather_pages"]

    @pytest.mark.parametrize("name", [n for n in presets.names("designs") if n not in ("resident", "streamed")])
    def test_every_design_runs_on_both_simulators(self, name: str) -> None:
        scene = scene_of(context_tokens=16384)
        found = {executor: simulate(scene, design_for(name), executor=executor) for executor in ("clock", "simpy")}
        assert found["clock"].h2d_bytes_per_step == found["simpy"].h2d_bytes_per_step
        assert found["clock"].tpot_s <= found["simpy"].tpot_s * (1 + 1e-9)


class TestTraffic:
    """Heads choose each for itself, by keys that all of them share: a sequence's keys are read once, or not at all."""

    @staticmethod
    def traffic(name: str, seed: int = 0, batch: int = 3, **changes: Any) -> Traffic:
        model = block_model(num_layers=3, kv_bytes_per_value=2.0)
        design = presets.load_design(name, model).with_fields(slot_pages=4, **changes)
        load = Workload(context_tokens=64, batch=batch, steps=6, warmup_steps=0)
        trace = random_trace(seed, layers=3, heads=2)
        return TrafficSource(trace, resample_heads=False).traffic(make_plan(model, tiny_machine(), design, load))

    @given(seed=st.integers(0, 20), tau=st.floats(-1.0, 1.5), batch=st.integers(1, 4))
    def test_sequences_that_select_are_those_with_a_head_that_does(self, seed: int, tau: float, batch: int) -> None:
        found = self.traffic("clo", seed, batch, tau=tau)
        for heads, sequences in (
            (found.demand_heads, found.demand_sequences),
            (found.spec_heads, found.spec_sequences),
        ):
            assert sequences is not None
            assert np.all(np.ceil(heads / 2) <= sequences)
            assert np.all(sequences <= np.minimum(heads, batch))

    def test_a_fresh_choice_is_of_every_sequence(self) -> None:
        found = self.traffic("resolve", prefetch_depth=0)
        assert np.array_equal(found.demand_sequences, found.demand_heads / 2)
        assert found.demand_sequences is not None
        assert np.all(found.demand_sequences == 3)

    def test_where_all_is_on_the_gpu_too(self) -> None:
        traffic = scene_of().source.traffic(scene_of().plan(design_for("resident-sparse")))
        assert traffic.demand_sequences is not None
        assert np.array_equal(np.unique(traffic.demand_sequences[:, 3:]), [16])
        assert not traffic.demand_sequences[:, :3].any()

    def test_steps_are_cut_alike(self) -> None:
        found = self.traffic("clo", tau=0.9)
        assert np.array_equal(found.steps(2, 4).demand_sequences, found.demand_sequences[2:4])  # type: ignore[index, arg-type]

    def test_other_designs_count_no_sequences(self) -> None:
        found = self.traffic("clo", selector="page_mean", budget_pages=2, recent_window_tokens=4)
        assert found.demand_sequences is None
        with pytest.raises(ValueError, match="counted only where a model's own indexer chooses"):
            found.amount("demand_sequences")


class TestPrice:
    COST = IndexerCost(source=Source.MEASURED, latency_s=1.0, per_token_s=0.5, efficiency=0.25)

    def test_its_own_entry_prices_it(self) -> None:
        scene = scene_of()
        assert scene.profile is not None
        pricer = Pricer(scene.profile.with_fields(block_indexer=self.COST.model_dump()), scene.machine)
        work = IndexTokens(8, Amount("demand_sequences", 4.8e12), "block_indexer")
        two = replace(NO_TRAFFIC, demand_sequences=np.array([[2.0]]))
        assert np.array_equal(pricer.seconds(work, two), [[1.0 + 8 * 0.5 + 2 / 0.25]])
        assert pricer.source(work) is Source.MEASURED
        nodes = record_step(scene.plan(design_for("resolve"))).nodes
        found = next(node.op.work for node in nodes if node.op.name == "index_tokens")
        assert found == IndexTokens(32768, Amount("demand_sequences", 32768 * 256.0), "block_indexer")

    @pytest.mark.parametrize("gpu", presets.names("profiles"))
    def test_every_profile_has_one(self, gpu: str) -> None:
        assert presets.load_named_profile(gpu).block_indexer.source.is_measured == (gpu != "a100")


class TestPrefill:
    @pytest.mark.parametrize(("gpus", "by", "heads", "share"), [(4, "heads", 1, 1), (8, "sequences", 4, 8)])
    def test_pairs_by_hand(self, gpus: int, by: str, heads: int, share: int) -> None:
        scene = scene_of(gpus, by=by)
        found = prefill_prices(scene, design_for("resolve"), chunk_tokens=4096)
        profile, gpu = scene.profile, scene.machine.gpu
        assert profile is not None
        rate = gpu.peak_flops_per_s
        scored = 2 * heads * 128 / (profile.prefill_block_indexer.efficiency * rate)
        ranked = heads / 128 * 4 / (profile.select_pages.efficiency * gpu.hbm_bytes_per_s)
        pair = 4 * 16 * heads * 128 / rate
        everything = 3 * pair / profile.prefill_attention.efficiency
        assert found.pair_ns == pytest.approx(1e9 * (57 * (scored + ranked) + everything) / share)
        chosen = 57 * pair / profile.prefill_block_attention.efficiency
        assert found.window_tokens == 2048
        assert found.pair_ns * found.window_share == pytest.approx(1e9 * chosen / share)

    def test_borrowed_costs_count_as_unknown(self) -> None:
        machine = presets.load_machine("a100").with_fields(tensor_parallel=8)
        found = prefill_prices(clo_sim.make_scene(M3, machine), design_for("resolve"), chunk_tokens=64)
        assert not found.attention_known
        assert not found.attention_measured
