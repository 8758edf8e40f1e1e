"""Latent attention: what it caches and weighs, what a step does and costs, what sharing it means."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import NO_TRAFFIC, flat_table, random_trace, tiny_design, tiny_model, tiny_profile, tiny_scene

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.kernel_tables import GemmTable, LatentAttentionTable, LatentMapTable
from clo.plan import make_plan
from clo.pricing import Pricer, hbm_bytes
from clo.schedule import Lane, record_step
from clo.schedule.work import Gemm, LatentAttention, LatentMap, StreamKernel
from clo.specs import Design, LatentSpec, ModelSpec, Workload, model_from_hf_config
from clo.table_prices import TablePrices
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices
from clo_sim.stand_in import TrafficSource

LATENT = {"kv_rank": 4, "rope_dim": 2, "nope_dim": 3, "value_dim": 5, "query_rank": 6}
LITE = presets.load_model("deepseek-v2-lite")
LARGE = presets.load_model("deepseek-v3")


def latent_model(**changes: Any) -> ModelSpec:
    """Two query heads over a vector of six values."""
    latent = LATENT | changes.pop("latent", {})
    return tiny_model(**{"num_kv_heads": 1, "head_dim": 6, "latent": latent} | changes)


def latent_profile(**changes: Any) -> Any:
    """Attention two seconds, a map half a second."""
    tables = {
        "latent_attention": flat_table(LatentAttentionTable, 2.0),
        "latent_map": flat_table(LatentMapTable, 0.5),
    }
    return tiny_profile(**tables | changes)


def scene_of(model: ModelSpec = LITE, machine: str = "h200", **sizes: int) -> Scene:
    return clo_sim.make_scene(model, machine, **{"context_tokens": 16384, "batch": 4} | sizes)


def main_works(scene: Scene, design: Design, layer: int) -> dict[str, Any]:
    """What the main stream does in a layer, in order."""
    nodes = record_step(scene.plan(design)).nodes
    return {node.op.name: node.op.work for node in nodes if node.lane is Lane.MAIN and node.op.layer == layer}


class TestShape:
    @pytest.mark.parametrize(
        ("name", "weights", "used", "kv_bytes"),
        # from the papers and model cards: all weights, those of a token, and 512 + 64 values of two bytes in each layer
        [
            ("deepseek-v2-lite", 15.7e9, 2.4e9, 31104),
            ("deepseek-v3", 671e9, 37e9, 70272),
            ("kimi-k2", 1.03e12, 32e9, 70272),
        ],
    )
    def test_models_are_as_large_as_their_makers_say(
        self, name: str, weights: float, used: float, kv_bytes: int
    ) -> None:
        model = presets.load_model(name)
        values = model.with_fields(weight_bytes_per_value=2.0).weight_bytes / 2
        assert values == pytest.approx(weights, rel=5e-3)
        assert model.token_weight_values == pytest.approx(used, rel=0.03)
        assert model.kv_bytes_per_token == kv_bytes

    @pytest.mark.parametrize("query_rank", [None, 24])
    def test_as_many_weights_as_the_library_makes(self, tmp_path: Path, query_rank: int | None) -> None:
        transformers = pytest.importorskip("transformers")
        torch = pytest.importorskip("torch")
        config = transformers.DeepseekV3Config(
            **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 128},
            **{"kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10},
            **{"q_lora_rank": query_rank, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
            **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        )
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        with torch.device("meta"):
            model = transformers.DeepseekV3ForCausalLM(config)
        spec = model_from_hf_config(tmp_path)
        matrices = sum(each.numel() for name, each in model.named_parameters() if "norm" not in name)
        assert spec.weight_bytes / 2 == matrices

    def test_a_vector_a_token_is_all_that_is_cached(self) -> None:
        model = latent_model()
        assert model.head_token_bytes == model.layer_token_bytes == 6 * 4
        assert model.kv_bytes_per_token == 2 * 6 * 4

    def test_weights_by_hand(self) -> None:
        maps = 2 * 4 * (3 + 5)
        low = 4 * (6 + 6) + 6 * 2 * (3 + 2) + 2 * 5 * 4
        assert latent_model().attention_weight_values(0) == low + maps
        direct = 4 * (2 * (3 + 2) + 6) + 2 * 5 * 4
        assert latent_model(latent={"query_rank": 0}).attention_weight_values(0) == direct + maps

    def test_maps_stay_wide_where_other_weights_are_fp8(self) -> None:
        wide, narrow = (latent_model(weight_bytes_per_value=width) for width in (2.0, 1.0))
        head, maps = 16 * 4 * 2, 2 * 2 * 4 * (3 + 5)
        assert narrow.weight_bytes - 2 * head - 2 * maps == (wide.weight_bytes - 2 * head - 2 * maps) / 2

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_kv_heads": 2}, r"num_kv_heads = 2 must be 1: latent attention keeps one vector a token"),
            ({"head_dim": 8}, r"head_dim = 8 must be latent.kv_rank \+ latent.rope_dim = 6"),
            ({"latent": {"kv_rank": 0}}, r"model.latent.kv_rank = 0"),
            ({"latent": {"rank": 1}}, r"model.latent.rank: unknown field"),
            ({"window_tokens": 8, "windowed_layers": (0,)}, r"latent excludes windowed_layers"),
        ],
    )
    def test_what_cannot_be_is_refused(self, changes: dict[str, Any], problem: str) -> None:
        fields = latent_model().model_dump() | changes
        if "latent" in changes:
            fields["latent"] = LATENT | changes["latent"]
        with pytest.raises(SpecError, match=problem):
            ModelSpec.parse(fields)


class TestMathematics:
    def test_attention_over_vectors_is_attention_over_the_keys_and_values_made_of_them(self) -> None:
        """What the schedule takes for granted: both maps may be applied to queries and outputs instead."""
        spec, heads, tokens = LatentSpec(**LATENT), 2, 9
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(tokens, spec.vector_dim))
        to_keys = rng.normal(size=(heads, spec.kv_rank, spec.nope_dim))
        to_values = rng.normal(size=(heads, spec.kv_rank, spec.value_dim))
        query = rng.normal(size=(heads, spec.query_dim))
        low, rope = vectors[:, : spec.kv_rank], vectors[:, spec.kv_rank :]

        def softmax(scores: Any) -> Any:
            weights = np.exp(scores - scores.max())
            return weights / weights.sum()

        for head in range(heads):
            nope, turned = query[head, : spec.nope_dim], query[head, spec.nope_dim :]
            keys = np.concatenate([low @ to_keys[head], rope], axis=1)
            expected = softmax(keys @ query[head]) @ (low @ to_values[head])
            mapped = np.concatenate([to_keys[head] @ nope, turned])
            assert mapped.shape == (spec.vector_dim,)
            found = (softmax(vectors @ mapped) @ low) @ to_values[head]
            assert found == pytest.approx(expected)


class TestStep:
    DESIGN = presets.load_design("resident")

    def test_a_layer_by_hand(self) -> None:
        scene = tiny_scene(random_trace(0), batch=3, model=latent_model(), profile=latent_profile())
        works = main_works(scene, self.DESIGN, 0)
        assert list(works) == [
            *("input_norm", "latent_proj", "latent_norm", "query_proj", "map_queries", "append_kv", "attention"),
            *("map_outputs", "out_proj", "post_norm", "gate_up_proj", "activation", "down_proj"),
        ]
        assert works["latent_proj"] == Gemm(3, 6 + 6, 4)
        assert works["latent_norm"] == StreamKernel("elementwise", 2 * 2 * 3 * (6 + 4))
        assert works["query_proj"] == Gemm(3, 2 * (3 + 2), 6)
        assert works["map_queries"] == LatentMap(3, 2, 3, 4)
        assert works["attention"] == LatentAttention(3, 64, 2, 4, 2, 4.0)
        assert works["map_outputs"] == LatentMap(3, 2, 5, 4)
        assert works["out_proj"] == Gemm(3, 4, 2 * 5)

    def test_queries_may_come_from_the_hidden_state(self) -> None:
        model = latent_model(latent={"query_rank": 0})
        scene = tiny_scene(random_trace(0), model=model, profile=latent_profile())
        works = main_works(scene, self.DESIGN, 0)
        assert "query_proj" not in works
        assert works["latent_proj"] == Gemm(1, 2 * (3 + 2) + 6, 4)

    def test_a_predicted_layers_queries_are_projected_and_mapped_too(self) -> None:
        scene = tiny_scene(random_trace(0), batch=3, model=latent_model(num_layers=3), profile=latent_profile())
        works = main_works(scene, tiny_design(4, prefetch_depth=1), 0)
        assert works["latent_proj"] == Gemm(3, 2 * 6 + 6, 4)
        assert works["query_proj"] == Gemm(3, 2 * 2 * (3 + 2), 6)
        assert works["map_queries"] == LatentMap(3, 2 * 2, 3, 4)
        assert works["map_outputs"] == LatentMap(3, 2, 5, 4)

    def test_the_maps_of_a_predicted_layer_are_weights_that_are_read(self) -> None:
        scene = tiny_scene(random_trace(0), batch=3, model=latent_model(num_layers=3), profile=latent_profile())
        ahead = main_works(scene, tiny_design(4, prefetch_depth=1), 0)["map_queries"]
        alone = main_works(scene, tiny_design(4), 0)["map_queries"]
        assert hbm_bytes(ahead, NO_TRAFFIC) == 2 * hbm_bytes(alone, NO_TRAFFIC)

    def test_a_step_takes_its_operations_by_hand(self) -> None:
        scene = tiny_scene(random_trace(0), model=latent_model(), profile=latent_profile())
        layer = 5 * 1.0 + 2 * 0.5 + 2.0 + 5 * 0.25  # GEMMs, maps, attention, small kernels
        assert simulate(scene, self.DESIGN, executor="clock").tpot_s == pytest.approx(2 * layer + 1.5, rel=1e-6)
        assert simulate(scene, self.DESIGN).tpot_s == pytest.approx(2 * layer + 1.5, rel=1e-6)

    @pytest.mark.parametrize("name", presets.names("designs"))
    def test_every_design_runs_and_says_whose_choices_stand_in(self, name: str) -> None:
        design = presets.load_design(name)
        result = simulate(scene_of(), design)
        notes = [note for note in result.assumptions if "latent attention can use such a choice again" in note]
        assert len(notes) == (design.offloads and design.selects)

    def test_the_roofline_reads_every_vector_once(self) -> None:
        roof = simulate(scene_of(), "resident", executor="clock").roofline
        attended = 4 * 16384 * LITE.kv_bytes_per_token
        assert roof.hbm_bytes == pytest.approx(LITE.step_weight_bytes(4) + attended)
        attention = 4 * 27 * 16384 * 16 * 2 * (576 + 512)
        assert roof.compute_s == pytest.approx((4 * 2 * LITE.token_weight_values + attention) / 989e12)

    def test_the_roofline_multiplies_by_maps_in_bf16(self) -> None:
        wide, narrow = (LITE.with_fields(weight_bytes_per_value=width) for width in (2.0, 1.0))
        bf16, fp8 = (simulate(scene_of(each), "resident", executor="clock").roofline for each in (wide, narrow))
        maps, head = 27 * 16 * 512 * (128 + 128), 102400 * 2048
        halved = LITE.token_weight_values - maps - head
        assert (bf16.compute_s - fp8.compute_s) * 989e12 == pytest.approx(4 * halved)

    def test_pages_hold_vectors(self) -> None:
        plan = scene_of().plan(presets.load_design("clo"))
        assert plan.page_bytes == 16 * 576 * 2
        assert plan.offloaded_heads == 4
        assert plan.host_bytes == len(plan.sparse_layers) * 4 * 16384 * 576 * 2


class TestPrices:
    def test_the_price_is_the_tables(self) -> None:
        profile, machine = presets.load_named_profile("h200"), presets.load_machine("h200")
        prices = TablePrices(profile, machine)
        assert profile.latent_attention is not None
        assert profile.latent_map is not None
        attention = LatentAttention(16, 8192, 128, 512, 64)
        assert prices.seconds(attention) == profile.latent_attention.seconds(16, 128, 8192)
        assert prices.seconds(LatentMap(16, 128, 128, 512)) == profile.latent_map.seconds(16, 128)
        assert Pricer(profile, machine).source(attention) == "aiconfigurator"

    def test_other_widths_are_priced_by_their_bytes(self) -> None:
        prices = TablePrices(presets.load_named_profile("h200"), presets.load_machine("h200"))
        timed = LatentAttention(16, 8192, 128, 512, 64)
        assert prices.seconds(replace(timed, kv_bytes_per_value=4.0)) == prices.seconds(replace(timed, kv_tokens=16384))
        narrow = replace(timed, kv_rank=256, rope_dim=32)
        assert prices.seconds(narrow) == prices.seconds(replace(timed, kv_tokens=4096))
        assert prices.seconds(LatentMap(16, 64, 256, 512)) == prices.seconds(LatentMap(16, 128, 128, 512))
        model = LITE.with_fields(latent=LITE.latent.model_dump() | {"value_dim": 256})  # type: ignore[union-attr]
        notes = simulate(scene_of(model), "resident").assumptions
        assert any("others are priced by their bytes" in note for note in notes)
        assert not any("priced by their bytes" in note for note in simulate(scene_of(), "resident").assumptions)

    def test_bytes_of_device_memory(self) -> None:
        assert hbm_bytes(LatentAttention(3, 100, 2, 4, 2, 4.0), NO_TRAFFIC) == 3 * 100 * 6 * 4
        assert hbm_bytes(LatentMap(3, 2, 5, 4), NO_TRAFFIC) == 2 * 2 * (5 * 4 + 3 * (5 + 4))

    def test_a_profile_without_times_is_named(self) -> None:
        scene = scene_of()
        for field, what in (("latent_attention", "latent attention"), ("latent_map", "the maps of latent attention")):
            bare = scene.profile.model_copy(update={field: None})
            with pytest.raises(SpecError, match=rf"model\.latent: profile h200 has no times of {what}$"):
                simulate(replace(scene, profile=bare), "resident")

    @pytest.mark.parametrize(("width", "whose"), [(2.0, "sglang"), (1.0, "trtllm")])
    def test_results_say_whose_kernels_these_are(self, width: float, whose: str) -> None:
        model = LITE.with_fields(kv_bytes_per_value=width)
        notes = simulate(scene_of(model), "resident", executor="clock").assumptions
        assert sum(note.startswith(f"latent attention was timed with kernels of {whose} ") for note in notes) == 1

    def test_on_another_gpu_they_are_carried_over(self) -> None:
        result = simulate(scene_of(machine="gh200"), "resident")
        assert result.ops["attention"].source == "assumed"
        assert result.ops["map_queries"].source == "assumed"

    def test_rooflines_by_hand(self) -> None:
        rates = {"hbm_bytes_per_s": 1e12, "flops_per_s": 1e13}
        fast = rates | {"flops_per_s": 1e14}
        attention = LatentAttentionTable.from_latencies(
            [[[1.0]]], batch=(1.0,), num_query_heads=(1.0,), kv_tokens=(1.0,), **fast
        )
        num_bytes = 2 * 4 * (576 * 1000 + 16 * (576 + 512))
        assert attention.roofline_seconds(4, 16, 1000) == pytest.approx(num_bytes / 1e12)
        assert attention.roofline_seconds(4, 128, 1000) == pytest.approx(2 * 4 * 128 * 1000 * (576 + 512) / 1e14)
        maps = LatentMapTable.from_latencies([[1.0]], rows=(1.0,), num_heads=(1.0,), **rates)
        assert maps.roofline_seconds(2, 16) == pytest.approx(2 * 16 * (128 * 512 + 2 * (128 + 512)) / 1e12)
        assert maps.roofline_seconds(2000, 16) == pytest.approx(2 * 2000 * 16 * 128 * 512 / 1e13)


class TestSharing:
    @given(st.sampled_from([2, 4, 8]))
    def test_gpus_share_the_heads_and_each_has_every_vector(self, gpus: int) -> None:
        part = LARGE.shard(gpus)
        assert (part.num_query_heads, part.num_kv_heads, part.head_dim) == (128 // gpus, 1, 576)
        assert part.kv_bytes_per_token == LARGE.kv_bytes_per_token
        # the projection to the low ranks and the router are on every GPU
        alike = 61 * 7168 * (1536 + 576) + 58 * 7168 * 256
        whole = LARGE.weight_bytes
        assert gpus * part.weight_bytes - whole == pytest.approx((gpus - 1) * alike)

    def test_heads_that_cannot_be_dealt_out_are_named(self) -> None:
        with pytest.raises(SpecError, match="tensor_parallel = 3: the 128 query heads of deepseek-v3 cannot be dealt"):
            LARGE.shard(3)

    def test_every_gpu_needs_the_memory_of_one(self) -> None:
        design, load = presets.load_design("streamed"), Workload(context_tokens=32768, batch=2)
        machines = [presets.load_machine("h200").with_fields(tensor_parallel=gpus) for gpus in (1, 4)]
        one, four = (make_plan(LITE, machine, design, load) for machine in machines)
        assert four.memory.kv == one.memory.kv
        assert four.host_bytes == one.host_bytes

    def test_results_say_so(self) -> None:
        scene = scene_of()
        shared = replace(scene, machine=scene.machine.with_fields(tensor_parallel=4))
        assert any("vectors of latent attention whole" in note for note in simulate(shared, "clo").assumptions)

    @pytest.mark.parametrize(("fraction", "kept"), [(0.125, "not pinned"), (0.75, "pinned whole")])
    def test_a_part_of_one_vector_cannot_be_pinned(self, fraction: float, kept: str) -> None:
        design = presets.load_design("clo").with_fields(pinned_head_fraction=fraction)
        note = f"pinned_head_fraction = {fraction:g}: all heads share one vector, which is {kept}"
        assert note in simulate(scene_of(), design, executor="clock").assumptions
        for all_or_none in (0.0, 1.0):
            plain = simulate(scene_of(), design.with_fields(pinned_head_fraction=all_or_none), executor="clock")
            assert not any("pinned_head_fraction" in one for one in plain.assumptions)

    def test_a_models_own_trace_is_of_all_its_heads(self) -> None:
        trace = random_trace(0, heads=1)
        model = tiny_model(num_layers=3, num_query_heads=4, num_kv_heads=1, head_dim=6, latent=LATENT)
        scene = tiny_scene(trace, model=model)
        plan = replace(scene, machine=scene.machine.with_fields(tensor_parallel=2)).plan(tiny_design(4))
        assert (plan.kv_heads_of_all, plan.query_heads_of_all) == (1, 4)
        # the trace has one query head for its KV head
        assert "stand for" in TrafficSource(trace).traffic(plan).assumptions[0]
        own = replace(plan, model=plan.model.with_fields(num_query_heads=1), machine=scene.machine)
        assert TrafficSource(trace, resample_heads=False).traffic(own).assumptions == ()


class TestPrefill:
    @pytest.mark.parametrize("tokens", [1, 300])
    def test_a_chunk_by_hand(self, tokens: int) -> None:
        scene, design = scene_of(), presets.load_design("clo")
        prices = TablePrices(scene.profile, scene.machine)  # type: ignore[arg-type]
        found = prefill_prices(scene, design, chunk_tokens=tokens)
        direct = scene.model.with_fields(latent=LITE.latent.model_dump() | {"query_rank": 512})  # type: ignore[union-attr]
        ranked = prefill_prices(replace(scene, model=direct), design, chunk_tokens=tokens)
        before = prices.seconds(Gemm(tokens, 16 * 192 + 576, 2048))
        after = prices.seconds(Gemm(tokens, 512 + 576, 2048)) + prices.seconds(Gemm(tokens, 16 * 192, 512))
        longer = (ranked.dense_ns[tokens] - found.dense_ns[tokens]) / 1e9
        assert longer == pytest.approx(27 * (after - before), rel=1e-6, abs=2e-9)
        # scores and sums over keys of 192 and values of 128; every chunk makes those of all tokens before it
        flops = 27 * (2 * 16 * (192 + 128) + 2 * 16 * 512 * (128 + 128) / tokens)
        efficiency = scene.profile.prefill_latent_attention.efficiency  # type: ignore[union-attr]
        assert found.pair_ns == pytest.approx(1e9 * flops / (efficiency * 989e12))

    def test_keys_and_values_of_new_tokens_are_made(self) -> None:
        scene, design = scene_of(), presets.load_design("clo")
        prices = TablePrices(scene.profile, scene.machine)  # type: ignore[arg-type]
        wider = scene.model.with_fields(latent=LITE.latent.model_dump() | {"value_dim": 256})  # type: ignore[union-attr]
        both = (replace(scene, model=model) for model in (scene.model, wider))
        found, more = (prefill_prices(one, design, chunk_tokens=256) for one in both)
        made = [prices.seconds(Gemm(256, 16 * (128 + value), 512)) for value in (128, 256)]
        out = [prices.seconds(Gemm(256, 2048, 16 * value)) for value in (128, 256)]
        expected = 27 * (made[1] - made[0] + out[1] - out[0])
        assert (more.dense_ns[256] - found.dense_ns[256]) / 1e9 == pytest.approx(expected, rel=1e-6, abs=2e-9)


class TestConfigs:
    DEEPSEEK: ClassVar[dict[str, Any]] = {
        **{"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280},
        **{"max_position_embeddings": 163840, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1},
        **{"tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"}},
    }

    @staticmethod
    def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
        (folder / "config.json").write_text(json.dumps(config))
        return model_from_hf_config(folder)

    def test_the_config_of_a_preset_is_the_preset(self, tmp_path: Path) -> None:
        named = {"name": "deepseek-v3", "source": LARGE.source}
        assert self.read(tmp_path, self.DEEPSEEK).with_fields(**named) == LARGE

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            (
                {"model_type": "glm4_moe"},
                "kv_lora_rank = 512: latent attention of model_type = 'glm4_moe' is not known",
            ),
            ({"kv_lora_rank": None}, "model_type = 'deepseek_v3': latent attention needs kv_lora_rank"),
            ({"index_topk": 2048}, "index_topk = 2048: known of model_type deepseek_v32, glm_moe_dsa only"),
            ({"v_head_dim": None}, "no field 'v_head_dim': latent attention needs it"),
            ({"kv_lora_rank": "512"}, "kv_lora_rank = '512': must be a whole number"),
            ({"moe_layer_freq": 2}, "moe_layer_freq = 2: which layers that means is not known"),
            ({"qk_rope_head_dim": 0}, "model.latent.rope_dim = 0"),
        ],
    )
    def test_what_is_not_known_is_refused(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            self.read(tmp_path, self.DEEPSEEK | changes)

    @pytest.mark.parametrize("field", ["kv_lora_rank", "q_lora_rank", "n_routed_experts", "qk_nope_head_dim"])
    def test_what_is_not_said_is_not_guessed(self, tmp_path: Path, field: str) -> None:
        with pytest.raises(SpecError, match=field):
            self.read(tmp_path, {name: value for name, value in self.DEEPSEEK.items() if name != field})

    def test_queries_from_the_hidden_state(self, tmp_path: Path) -> None:
        latent = self.read(tmp_path, self.DEEPSEEK | {"q_lora_rank": None}).latent
        assert latent is not None
        assert latent.query_rank == 0


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_real_decoder_makes_up_one_of_its_shape() -> None:
    pytest.importorskip("transformers")
    from clo.engine.models.made_up import library_kind

    kind, fields = library_kind(latent_model())
    latent = latent_model().latent
    assert latent is not None
    assert kind == "DeepseekV3"
    assert (fields["kv_lora_rank"], fields["qk_rope_head_dim"]) == (latent.kv_rank, latent.rope_dim)


def test_a_flat_table_is_flat() -> None:
    """What the steps by hand rest on."""
    assert flat_table(GemmTable, 1.0).seconds(3, 7, 9) == pytest.approx(1.0)
    assert flat_table(LatentMapTable, 0.5).seconds(3, 7) == pytest.approx(0.5)
