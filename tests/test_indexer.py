"""Models that choose the tokens they attend to by themselves: shape, plan, step, prices, prefill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_latent import LATENT
from tiny import NO_TRAFFIC, random_trace, tiny_machine, tiny_model

import clo_sim
from clo import presets
from clo.engine.versions import release_of
from clo.errors import SpecError, TraceError
from clo.placement import choosing_layers, hosted_token_bytes
from clo.plan import make_plan
from clo.pricing import Pricer
from clo.profile import IndexerCost, Source
from clo.schedule import Lane, record_step
from clo.schedule.work import Amount, IndexTokens
from clo.specs import Design, IndexerSpec, ModelSpec, Workload, model_from_hf_config
from clo.traffic import Traffic
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving.memory import memory_need
from clo_sim.serving.prefill import prefill_prices
from clo_sim.stand_in import TrafficSource

INDEXER = {"num_heads": 3, "head_dim": 2, "top_tokens": 8, "key_bytes": 3.0}
DEEPSEEK, GLM = presets.load_model("deepseek-v3.2"), presets.load_model("glm-5.2")


def indexed_model(**changes: Any) -> ModelSpec:
    """Two query heads over a vector of six values, and an indexer of three heads."""
    indexer = INDEXER | changes.pop("indexer", {})
    return tiny_model(**{"num_kv_heads": 1, "head_dim": 6, "latent": LATENT, "indexer": indexer} | changes)


def scene_of(model: ModelSpec = DEEPSEEK, **sizes: int) -> Scene:
    machine = presets.load_machine("h200").with_fields(tensor_parallel=8, attention_by="sequences")
    return clo_sim.make_scene(model, machine, **{"context_tokens": 32768, "batch": 16} | sizes)


def design_for(name: str, model: ModelSpec = DEEPSEEK, **changes: Any) -> Design:
    return presets.load_design(name, model).with_fields(**changes)


def selecting(heads: float) -> Traffic:
    """One step of one layer in which so many sequences select anew."""
    return replace(NO_TRAFFIC, demand_heads=np.array([[heads]]))


class TestShape:
    @pytest.mark.parametrize(
        ("name", "weights", "index_bytes"),
        # model cards: 685 B with the layer that predicts two tokens, which has 14 B; 744 B of GLM-5 with such a layer
        [("deepseek-v3.2", 672e9, 61 * 132), ("glm-5.1", 744e9, 78 * 132), ("glm-5.2", 743e9, 21 * 132)],
    )
    def test_models_are_as_large_as_their_makers_say(self, name: str, weights: float, index_bytes: float) -> None:
        model = presets.load_model(name)
        assert model.with_fields(weight_bytes_per_value=2.0).weight_bytes / 2 == pytest.approx(weights, rel=6e-3)
        plan = scene_of(model, batch=8).plan(design_for("resident-sparse", model))
        assert plan.memory.index == 32768 * index_bytes

    @pytest.mark.parametrize("kind", ["DeepseekV32", "GlmMoeDsa"])
    def test_as_many_weights_as_the_library_makes(self, tmp_path: Path, kind: str) -> None:
        transformers = pytest.importorskip("transformers")
        torch = pytest.importorskip("torch")
        if release_of(transformers.__version__) < (5, 18):
            pytest.skip("older versions have another name for such layers")
        config = getattr(transformers, f"{kind}Config")(
            **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 128},
            **{"kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10},
            **{"q_lora_rank": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
            **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
            **{"index_n_heads": 5, "index_head_dim": 16, "index_topk": 7},
            **{"mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["indexed_attention"] * 3},
            **({"indexer_types": ["full"] * 3} if kind == "GlmMoeDsa" else {}),
        )
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        with torch.device("meta"):
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        spec = model_from_hf_config(tmp_path)
        matrices = sum(each.numel() for name, each in model.named_parameters() if "norm" not in name)
        assert spec.weight_bytes / 2 == matrices
        assert spec.indexer == IndexerSpec(num_heads=5, head_dim=16, top_tokens=7)

    def test_layers_that_share_have_no_weights_of_an_indexer(self) -> None:
        one = 3 * 2 * 6 + (2 + 3) * 4
        around = 2 * indexed_model().attention_weight_values(0)
        assert indexed_model().all_attention_weight_values == around + 2 * one
        sharing = indexed_model(indexer={"shared_layers": (1,)})
        assert sharing.all_attention_weight_values == around + one
        assert indexed_model().weight_bytes - sharing.weight_bytes == 2 * one

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"indexer": {"shared_layers": (0,)}}, "the first layer has nothing to share"),
            ({"indexer": {"shared_layers": (1, 1)}}, "must ascend"),
            ({"indexer": {"shared_layers": (2,)}}, "indexer.shared_layers: 2 must be less than num_layers = 2"),
            ({"latent": LATENT | {"query_rank": 0}}, "its queries are made from a query_rank"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            indexed_model(**changes)


class TestDesigns:
    def test_what_a_preset_leaves_open_is_as_the_model_attends(self) -> None:
        design = design_for("resolve")
        assert (design.selector, design.page_size, design.budget_pages) == ("indexer", 1, 2048)
        assert (design.dense_layers, design.num_sink_tokens, design.recent_window_tokens) == (0, 0, 1)
        assert design.cache == "lru"

    def test_what_a_file_says_stays(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text(
            'cache = "lru"\nselector = "page_mean"\npage_size = 64\nprefetch_depth = 0\n'
        )
        design = presets.load_design(str(tmp_path / "mine.toml"), DEEPSEEK)
        assert (design.selector, design.page_size) == ("page_mean", 64)

    def test_pages_of_another_selector_hold_as_many_tokens(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text('cache = "lru"\nselector = "page_mean"\npage_size = 48\n')
        design = presets.load_design(str(tmp_path / "mine.toml"), DEEPSEEK)
        assert design.budget_pages == 43  # of 2,064 tokens

    def test_a_share_of_the_context_that_a_file_says_counts(self, tmp_path: Path) -> None:
        (tmp_path / "mine.toml").write_text('cache = "lru"\nprefetch_depth = 0\nbudget_fraction = 0.03125\n')
        design = presets.load_design(str(tmp_path / "mine.toml"), DEEPSEEK)
        assert scene_of().plan(design).budget_pages == 1024

    @pytest.mark.parametrize("name", presets.names("designs"))
    def test_other_models_change_nothing(self, name: str) -> None:
        assert presets.load_design(name, presets.load_model("deepseek-v3")) == presets.load_design(name)

    def test_by_name_in_a_scene(self) -> None:
        assert simulate(scene_of(), "resolve").design == design_for("resolve")


class TestPlan:
    def test_it_attends_to_the_chosen_tokens_and_the_newest(self) -> None:
        plan = scene_of().plan(design_for("resolve"))
        assert (plan.num_pages, plan.budget_pages, plan.attended_tokens) == (32768, 2048, 2049)
        assert plan.page_bytes == 576 * 2

    @given(tokens=st.integers(2, 4096))
    def test_a_short_sequence_attends_to_all_there_is(self, tokens: int) -> None:
        plan = scene_of(context_tokens=tokens).plan(design_for("resolve"))
        assert plan.budget_pages == min(tokens, 2048)
        assert plan.attended_tokens == min(tokens, 2049)

    @pytest.mark.parametrize(
        ("name", "changes", "problem"),
        [
            ("resident", {}, "attend = full is not what deepseek-v3.2 does, which attends to the 2048 tokens"),
            ("streamed", {}, "attend = full is not what deepseek-v3.2 does"),
            ("clo", {"dense_layers": 2}, "design.dense_layers = 2: deepseek-v3.2 attends to the 2048 tokens"),
            (
                "clo",
                {"page_size": 16},
                "page_size = 16: the indexer of deepseek-v3.2 chooses single tokens: set it to 1",
            ),
            ("resident-sparse", {"page_size": 2}, "page_size = 2: the indexer of deepseek-v3.2 chooses single tokens"),
            ("clo", {"pinned_head_fraction": 1.0}, "design.pinned_head_fraction = 1: deepseek-v3.2 attends"),
        ],
    )
    def test_what_the_model_does_not_do_is_refused(self, name: str, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            scene_of().plan(design_for(name, **changes))

    def test_what_does_not_fit_names_what_helps(self) -> None:
        with pytest.raises(SpecError, match=r"left for KV: lower design\.slot_pages or .*, workload\.batch or"):
            scene_of(batch=8192).plan(design_for("resolve", slot_pages=4096))

    def test_a_model_without_one_cannot_use_it(self) -> None:
        design = presets.load_design("clo").with_fields(selector="indexer")
        with pytest.raises(SpecError, match=r"selector = indexer: llama-3-8b has no indexer \(model.indexer\)"):
            clo_sim.make_scene(context_tokens=4096, batch=1).plan(design)

    def test_another_selector_may_take_its_place(self) -> None:
        design = presets.load_design("resolve").with_fields(budget_fraction=0.05)
        plan = scene_of().plan(design)
        assert plan.index_bytes_per_head == 32768 * (576 / 2 + 4)
        assert not any(plan.shares_choice(layer) for layer in range(61))

    def test_layers_that_share_keep_no_index(self) -> None:
        plan = scene_of(GLM).plan(design_for("resolve", GLM))
        assert choosing_layers(GLM, plan.design) == (0, 1, 2, *range(6, 78, 4))
        assert [plan.shares_choice(layer) for layer in range(7)] == [False, False, False, True, True, True, False]

    def test_a_service_counts_the_index_of_every_token(self) -> None:
        dealt = scene_of(GLM)
        with_index = memory_need(dealt, design_for("resolve", GLM, slot_pages=4096))
        bytes_of_a_token = 21 * 132
        assert with_index.device_per_token == pytest.approx(bytes_of_a_token / 8, abs=1)


class TestStep:
    @staticmethod
    def names(scene: Scene, design: Design, layer: int) -> list[str]:
        nodes = record_step(scene.plan(design)).nodes
        return [node.op.name for node in nodes if node.lane is Lane.MAIN and node.op.layer == layer]

    @pytest.mark.parametrize(
        ("name", "choice", "shared"),
        [
            ("resident-sparse", ["index_tokens"], ["share_pages"]),
            (
                "resolve",
                ["index_tokens", "resolve_pages", "gather_pages"],
                ["share_pages", "resolve_pages", "gather_pages"],
            ),
            (
                "clo",
                ["hit_test", "index_tokens", "resolve_pages", "gather_pages"],
                ["share_pages", "resolve_pages", "gather_pages"],
            ),
        ],
    )
    def test_between_the_new_token_and_attention(self, name: str, choice: list[str], shared: list[str]) -> None:
        scene, design = scene_of(GLM), design_for(name, GLM)
        for layer, expected in ((6, choice), (7, shared)):
            names = self.names(scene, design, layer)
            assert names[names.index("append_kv") + 1 : names.index("attention")] == expected

    @pytest.mark.parametrize("name", [n for n in presets.names("designs") if n not in ("resident", "streamed")])
    def test_every_design_runs_on_both_simulators(self, name: str) -> None:
        scene = scene_of(GLM, context_tokens=16384)
        found = {executor: simulate(scene, design_for(name, GLM), executor=executor) for executor in ("clock", "simpy")}
        assert found["clock"].h2d_bytes_per_step == found["simpy"].h2d_bytes_per_step
        assert found["clock"].tpot_s <= found["simpy"].tpot_s * (1 + 1e-9)

    def test_layers_that_share_a_choice_fetch_alike(self) -> None:
        scene = scene_of(GLM)
        traffic = scene.source.traffic(scene.plan(design_for("resolve", GLM)))
        for layer in (7, 8, 9):
            assert np.array_equal(traffic.demand_pages[:, layer], traffic.demand_pages[:, 6])
        assert not np.array_equal(traffic.demand_pages[:, 10], traffic.demand_pages[:, 6])

    @pytest.mark.parametrize("name", ["resolve", "clo"])
    def test_they_do_in_a_trace_of_the_model_itself(self, name: str) -> None:
        trace = random_trace(0, layers=3, heads=1)
        indexer = {"top_tokens": 16, "shared_layers": (1,)}
        model = indexed_model(num_layers=3, num_query_heads=1, indexer=indexer, kv_bytes_per_value=2.0)
        design = design_for(name, model, slot_pages=16, tau=0.9)
        plan = make_plan(model, tiny_machine(), design, Workload(context_tokens=64, batch=2, steps=6, warmup_steps=0))
        traffic = TrafficSource(trace, resample_heads=False).traffic(plan)
        assert np.array_equal(traffic.demand_pages[:, 1], traffic.demand_pages[:, 0])
        assert np.array_equal(traffic.demand_heads[:, 1], traffic.demand_heads[:, 0])
        assert not np.array_equal(traffic.demand_pages[:, 2], traffic.demand_pages[:, 0])

    def test_reuse_spares_the_indexer(self) -> None:
        fresh, kept = (simulate(scene_of(), design_for(name)) for name in ("resolve", "clo"))
        assert kept.ops["index_tokens"].seconds < fresh.ops["index_tokens"].seconds


class TestShortContexts:
    """The trace records the best quarter of a context: what a model chooses of a short one is more."""

    @pytest.mark.parametrize("tokens", [2, 128, 2048, 8000])
    @pytest.mark.parametrize("name", ["resolve", "clo", "staged", "recall"])
    def test_every_context_has_traffic(self, name: str, tokens: int) -> None:
        scene = scene_of(context_tokens=tokens)
        plan = scene.plan(design_for(name))
        traffic = scene.source.traffic(plan)
        assert np.all(traffic.demand_pages + traffic.spec_pages <= (traffic.spec_heads + 2) * min(tokens, 2048))
        assert any("recorded pages stand for all that an indexer chooses" in note for note in traffic.assumptions)

    @pytest.mark.parametrize("tokens", [128, 2048, 4096])
    def test_a_cache_of_all_misses_only_what_is_new(self, tokens: int) -> None:
        found = simulate(scene_of(context_tokens=tokens), design_for("resolve"))
        assert found.slot_pages == tokens
        assert 0.995 < found.hit_rate < 1.0

    def test_without_a_cache_all_that_is_chosen_moves(self) -> None:
        scene = scene_of(context_tokens=1024)
        plan = scene.plan(design_for("staged", prefetch_depth=0))
        assert scene.source.traffic(plan).demand_pages == pytest.approx(2 * 1024)

    def test_other_selectors_need_what_was_recorded(self) -> None:
        design = design_for("resolve", selector="key_4bit")
        with pytest.raises(
            TraceError, match=r"design\.budget_pages = 2048, 0\.5 of the context: the trace records only"
        ):
            simulate(scene_of(context_tokens=4096), design)

    def test_one_token_is_nothing_to_select(self) -> None:
        with pytest.raises(SpecError, match=r"take more tokens, or a design that keeps all on the GPU"):
            simulate(scene_of(context_tokens=1), "resolve")
        assert simulate(scene_of(context_tokens=1), "resident-sparse").tpot_s > 0


class TestPrice:
    COST = IndexerCost(source=Source.MEASURED, latency_s=1.0, per_token_s=0.5, efficiency=0.25)

    def test_latency_then_ranking_and_scanning(self) -> None:
        scene = scene_of()
        pricer = Pricer(scene.profile.with_fields(indexer=self.COST.model_dump()), scene.machine)  # type: ignore[union-attr]
        work = IndexTokens(8, Amount("demand_heads", 4.8e12))
        assert np.array_equal(pricer.seconds(work, selecting(3.0)), [[1.0 + 8 * 0.5 + 3 / 0.25]])
        assert np.array_equal(pricer.seconds(work, selecting(0.0)), [[1.0]])
        assert pricer.source(work) is Source.MEASURED

    def test_published_costs_belong_to_their_gpu(self) -> None:
        scene, work = scene_of(), IndexTokens(8, 100.0)
        here = Pricer(scene.profile, scene.machine)  # type: ignore[arg-type]
        assert here.source(work) is Source.AICONFIGURATOR
        assert here.uncertainty(work)[1] > 0
        slower = scene.machine.gpu.with_fields(hbm_bytes_per_s=1e12).model_dump()
        there = Pricer(scene.profile, scene.machine.with_fields(gpu=slower))  # type: ignore[arg-type]
        assert there.source(work) is Source.ASSUMED
        assert there.uncertainty(work)[1] == 0

    @pytest.mark.parametrize("gpu", presets.names("profiles"))
    def test_every_profile_has_one(self, gpu: str) -> None:
        profile = presets.load_named_profile(gpu)
        assert profile.indexer.source.is_measured == (gpu in ("h100", "h200", "gh200", "b200"))


class TestPrefill:
    def test_pairs_by_hand(self) -> None:
        scene, design = scene_of(GLM), design_for("resolve", GLM)
        found = prefill_prices(scene, design, chunk_tokens=4096)
        profile, gpu = scene.profile, scene.machine.gpu
        rate = gpu.peak_flops_per_s
        scored = 2 * 32 * 128 / (profile.prefill_indexer.efficiency * rate)  # type: ignore[union-attr]
        ranked = 4 / (profile.select_pages.efficiency * gpu.hbm_bytes_per_s)  # type: ignore[union-attr]
        attended = 2 * 64 * (576 + 512) / (profile.prefill_chosen_attention.efficiency * rate)  # type: ignore[union-attr]
        # eight GPUs attend for sequences of their own; 21 of 78 layers have an indexer
        assert found.pair_ns == pytest.approx(1e9 * 21 * (scored + ranked) / 8)
        assert found.window_tokens == 2048
        assert found.pair_ns * found.window_share == pytest.approx(1e9 * 78 * attended / 8)

    def test_a_longer_prompt_attends_to_no_more_tokens(self) -> None:
        found = prefill_prices(scene_of(), design_for("resolve"), chunk_tokens=2048)
        grown = found.pairs(32768, 1) - found.pairs(16384, 1)
        assert grown == pytest.approx(16384)

    @pytest.mark.parametrize("name", ["resolve", "resident-sparse"])
    def test_a_kept_prefix_has_its_keys(self, name: str) -> None:
        scene, design = scene_of(GLM), design_for(name, GLM)
        vectors, keys = 78 * 576 * 2, 21 * 132
        found = prefill_prices(scene, design, chunk_tokens=64, block_tokens=512)
        link = scene.machine.link
        assert found.out_ns == pytest.approx(1e9 * (vectors + keys) / 8 / link.d2h_bytes_per_s)
        loaded = keys if design.offloads else vectors + keys
        assert found.cached_in_ns == pytest.approx(1e9 * loaded / 8 / link.h2d_bytes_per_s)
        assert hosted_token_bytes(GLM, design.with_fields(selector="key_4bit")) == vectors

    @pytest.mark.parametrize(("machine", "known"), [("h200", True), ("a100", False)])
    def test_intervals_count_what_was_borrowed_as_unknown(self, machine: str, known: bool) -> None:
        scene = clo_sim.make_scene(GLM, presets.load_machine(machine).with_fields(tensor_parallel=8))
        found = prefill_prices(scene, design_for("resolve", GLM), chunk_tokens=64)
        assert found.attention_known == known

    def test_the_projections_of_indexers_are_priced(self) -> None:
        alone = DEEPSEEK.with_fields(indexer=DEEPSEEK.indexer.with_fields(shared_layers=range(1, 61)).model_dump())  # type: ignore[union-attr]
        more, less = (
            prefill_prices(scene_of(model), design_for("resolve", model), chunk_tokens=64)
            for model in (DEEPSEEK, alone)
        )
        assert more.dense_ns[64] > less.dense_ns[64]
