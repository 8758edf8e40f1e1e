"""Mixtures of experts: how many a batch reads, what they weigh, what they cost, what of their times was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import DENSE, HARDWARE, MIXTURE, SHAPES, law, mixture, timed_experts
from needs import needs_measurements
from tiny import NO_TRAFFIC

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.kernel_tables import ExpertsTable
from clo.pricing import Pricer, hbm_bytes
from clo.schedule import Lane, record_step
from clo.schedule.ops import experts_work
from clo.schedule.work import Experts, Gemm
from clo.specs import ExpertsSpec, ModelSpec, model_from_hf_config
from clo.specs.cut import first_layers
from clo.table_prices import TablePrices
from clo_calibration.tables import experts as points_of
from clo_calibration.tables import fit, measurements
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices


def scene_of(model: ModelSpec, batch: int = 4, machine: str = "h200") -> Scene:
    return clo_sim.make_scene(model, machine, context_tokens=8192, batch=batch)


def experts_like(**fields: int) -> ExpertsSpec:
    return ExpertsSpec.parse(MIXTURE | fields)


class TestHowMany:
    @given(st.integers(1, 64), st.data(), st.integers(1, 300))
    def test_between_what_one_token_passes_and_all(self, count: int, data: st.DataObject, tokens: int) -> None:
        passed = data.draw(st.integers(1, count))
        experts = experts_like(num_experts=count, experts_per_token=passed)
        used = experts.used_by(tokens)
        assert passed * (1 - 1e-12) <= used <= min(count, passed * tokens) * (1 + 1e-12)
        assert used <= experts.used_by(tokens + 1)

    def test_one_token_passes_its_experts(self) -> None:
        assert experts_like().used_by(1) == pytest.approx(2)
        assert experts_like(num_experts=8, experts_per_token=8).used_by(5) == 8

    @pytest.mark.parametrize("tokens", [2, 7, 40])
    def test_as_many_as_when_tokens_draw_their_experts(self, tokens: int) -> None:
        experts, rng, runs = experts_like(num_experts=32, experts_per_token=4), np.random.default_rng(0), 4000
        scores = rng.random((runs, tokens, 32))
        chosen = scores.argpartition(4, axis=-1)[..., :4]
        hit = np.zeros((runs, 32), dtype=bool)
        np.put_along_axis(hit, chosen.reshape(runs, -1), True, axis=1)
        drawn = hit.sum(axis=1)
        assert abs(drawn.mean() - experts.used_by(tokens)) < 4 * drawn.std() / np.sqrt(runs)

    def test_of_an_array_an_array(self) -> None:
        experts = experts_like()
        assert experts.used_by(np.arange(1.0, 9.0)) == pytest.approx([experts.used_by(n) for n in range(1, 9)])


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "all_weights", "used_weights"),
        # from the model cards: 30.5 and 235 billion in all, 3.3 and 22 billion of them for a token
        [("qwen3-30b-a3b", 30.5e9, 3.3e9), ("qwen3-235b-a22b", 235e9, 22e9)],
    )
    def test_models_weigh_what_their_makers_say(self, name: str, all_weights: float, used_weights: float) -> None:
        model = presets.load_model(name)
        embedding = model.vocab_size * model.hidden_size
        assert model.weight_bytes / 2 == pytest.approx(all_weights, rel=2e-3)
        assert model.token_weight_values + embedding == pytest.approx(used_weights, rel=0.02)

    def test_experts_by_hand(self) -> None:
        model = mixture(shared_intermediate_size=100, dense_layers=2)
        attention = 4096 * (6144 + 4096)
        dense = attention + 3 * 4096 * 14336
        rest = attention + 3 * 4096 * 100 + 4096 * 16
        assert model.layer_weight_values(1) == dense
        assert model.layer_weight_values(2) == rest + 16 * 3 * 4096 * 1792
        assert model.weight_bytes == 2 * (2 * dense + 30 * (rest + 16 * 3 * 4096 * 1792) + 2 * 128256 * 4096)
        assert model.token_weight_values == 2 * dense + 30 * (rest + 2 * 3 * 4096 * 1792) + 128256 * 4096
        used = 16 * (1 - (14 / 16) ** 3)
        expected = 2 * dense + 30 * (rest + used * 3 * 4096 * 1792) + 128256 * 4096
        assert model.step_weight_bytes(3) == pytest.approx(2 * expected)

    def test_a_number_of_layers_in_error_costs_no_time(self) -> None:
        one, many = (mixture(dense_layers=2).with_fields(num_layers=layers) for layers in (3, 10**9 + 3))
        assert many.weight_bytes - one.weight_bytes == pytest.approx(2e9 * one.layer_weight_values(2))
        assert many.token_weight_values > 1e9 * one.layer_weight_values(2, 2)

    @given(st.integers(1, 512))
    def test_a_step_reads_no_less_than_a_token_uses_and_no_more_than_there_is(self, batch: int) -> None:
        model = mixture()
        assert 2 * model.token_weight_values * (1 - 1e-12) <= model.step_weight_bytes(batch) < model.weight_bytes

    @given(st.sets(st.integers(0, 31), min_size=1))
    def test_experts_in_any_layers(self, chosen: set[int]) -> None:
        model = mixture(shared_intermediate_size=64, layers=sorted(chosen))
        embeddings, summed = (
            abs(one.weight_bytes / 2 - sum(map(one.layer_weight_values, range(32)))) for one in (mixture(), model)
        )
        assert summed == pytest.approx(embeddings, rel=1e-9)
        assert [model.experts_in(layer) is not None for layer in range(32)] == [layer in chosen for layer in range(32)]
        assert model.num_expert_layers == len(chosen)
        first = min(chosen)
        cut = first_layers(model, first + 1)
        assert cut.experts is not None
        assert cut.experts.layers == (first,)
        assert first == 0 or first_layers(model, first).experts is None

    @pytest.mark.parametrize("gpus", [2, 4, 8])
    def test_gpus_share_every_expert_and_each_has_the_router(self, gpus: int) -> None:
        model = mixture(shared_intermediate_size=64)
        router = 32 * 4096 * 16 * 2
        together = gpus * model.shard(gpus).weight_bytes
        assert together - model.weight_bytes == pytest.approx((gpus - 1) * router)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"experts_per_token": 17}, r"model.experts: experts_per_token = 17 must be at most num_experts = 16"),
            ({"dense_layers": 32}, r"experts.dense_layers = 32 must be less than num_layers = 32"),
            ({"num_experts": 0}, r"model.experts.num_experts = 0"),
            ({"layers": [3, 1]}, r"layers = \[3, 1\]: each once, in their order"),
            ({"layers": [1, 1]}, r"layers = \[1, 1\]: each once, in their order"),
            ({"layers": [3], "dense_layers": 2}, "dense_layers = 2 must be 0 beside them"),
            ({"layers": [3, 32]}, "experts.layers: 32 must be less than num_layers = 32"),
            ({"colour": 1}, r"model.experts.colour: unknown field"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            mixture(**fields)


class TestConfigs:
    QWEN: ClassVar[dict[str, Any]] = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }

    @staticmethod
    def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
        (folder / "config.json").write_text(json.dumps(config))
        return model_from_hf_config(folder)

    def test_qwen(self, tmp_path: Path) -> None:
        preset = presets.load_model("qwen3-30b-a3b")
        assert self.read(tmp_path, self.QWEN) == preset.with_fields(
            name=tmp_path.name, source=f"{tmp_path / 'config.json'}; assumed: bf16 weights, bf16 KV, gated MLP"
        )

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"model_type": "mixtral", "num_local_experts": 8, "num_experts": None, "moe_intermediate_size": None},
                {"num_experts": 8, "intermediate_size": 6144},
            ),
            ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 5632}, {"shared_intermediate_size": 5632}),
            (
                {
                    "model_type": "glm4_moe",
                    "n_routed_experts": 160,
                    "num_experts": None,
                    "n_shared_experts": 2,
                    "first_k_dense_replace": 3,
                },
                {"num_experts": 160, "shared_intermediate_size": 1536, "dense_layers": 3},
            ),
            ({"mlp_only_layers": [0, 1]}, {"dense_layers": 2}),
            ({"mlp_only_layers": [5]}, {"layers": (*range(5), *range(6, 48))}),
            ({"decoder_sparse_step": 2}, {"layers": tuple(range(1, 48, 2))}),
            ({"decoder_sparse_step": 3, "mlp_only_layers": [5, 99]}, {"layers": (2, *range(8, 48, 3))}),
            ({"mlp_layer_types": ["sparse"] * 47 + ["dense"]}, {"layers": tuple(range(47))}),
            ({"mlp_layer_types": ["dense"] + ["sparse"] * 47, "first_k_dense_replace": 3}, {"dense_layers": 1}),
        ],
        ids=[
            *(
                "mixtral",
                "qwen2_moe",
                "glm4_moe",
                "dense first layers",
                "one dense",
                "each second",
                "each third but one",
            ),
            *("listed", "listed and said otherwise"),
        ],
    )
    def test_other_kinds(self, tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]) -> None:
        experts = self.read(tmp_path, self.QWEN | changes).experts
        assert experts is not None
        assert {name: getattr(experts, name) for name in expected} == expected
        assert experts.experts_per_token == 8

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"model_type": "jamba"}, "experts of model_type = 'jamba' are not known"),
            ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be a positive whole number"),
            ({"decoder_sparse_step": "2"}, "decoder_sparse_step = '2': must be a positive whole number"),
            ({"mlp_only_layers": ["5"]}, "mlp_only_layers: '5': must be the number of a layer"),
            ({"mlp_only_layers": 5}, "mlp_only_layers = 5: must be a list"),
            ({"model_type": "glm4_moe", "n_shared_experts": "2"}, "n_shared_experts = '2': must be a whole number"),
            ({"moe_intermediate_size": [768]}, r"moe_intermediate_size = \[768\]: must be a whole number"),
            ({"text_config": 5}, "text_config = 5: a JSON object"),
            ({"num_experts_per_tok": None}, "model.experts.experts_per_token"),
            ({"num_experts_per_tok": 200}, "experts_per_token = 200 must be at most num_experts = 128"),
        ],
    )
    def test_what_is_not_known_is_refused(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            self.read(tmp_path, self.QWEN | changes)


class TestStep:
    @staticmethod
    def names(model: ModelSpec, layer: int) -> list[str]:
        nodes = record_step(scene_of(model).plan(presets.load_design("resident"))).nodes
        named = [node.op.name for node in nodes if node.lane is Lane.MAIN and node.op.layer == layer]
        start = named.index("post_norm") + 1
        return [name for name in named[start:] if name not in ("final_norm", "lm_head", "sample")]

    def test_experts_take_the_place_of_the_mlp(self) -> None:
        model = mixture(dense_layers=2)
        assert self.names(model, 1) == ["gate_up_proj", "activation", "down_proj"]
        assert self.names(model, 2) == ["router_proj", "route", "experts"]
        some = mixture(layers=[0, 2])
        assert [self.names(some, layer)[0] for layer in range(4)] == ["router_proj", "gate_up_proj"] * 2
        shared = mixture(shared_intermediate_size=64)
        assert self.names(shared, 5) == [*self.names(model, 1), *self.names(model, 2)]

    @pytest.mark.parametrize("batch", [1, 8])
    def test_a_step_differs_by_what_takes_the_place_of_the_mlp(self, batch: int) -> None:
        scenes = [scene_of(model, batch) for model in (DENSE, mixture(dense_layers=2, shared_intermediate_size=256))]
        dense, mixed = (simulate(scene, "resident", executor="clock") for scene in scenes)
        ops = ("gate_up_proj", "activation", "down_proj", "router_proj", "route", "experts")
        seconds = [sum(one.ops[name].seconds for name in ops if name in one.ops) for one in (dense, mixed)]
        assert mixed.ops["experts"].calls == mixed.ops["route"].calls == 30
        assert mixed.tpot_s - dense.tpot_s == pytest.approx(seconds[1] - seconds[0], rel=1e-9)
        assert mixed.ops["experts"].source == "aiconfigurator"

    def test_the_price_is_the_tables(self) -> None:
        scene = scene_of(mixture(), batch=5)
        experts, table = scene.model.experts, scene.profile.experts  # type: ignore[union-attr]
        assert experts is not None
        assert table is not None
        used = 16 * (1 - (14 / 16) ** 5)
        work = experts_work(scene.model, experts, 5)
        assert (work.num_used, work.rows) == pytest.approx((used, 10 / used))
        pricer = Pricer(scene.profile, scene.machine)  # type: ignore[arg-type]
        seconds = table.seconds(3 * used * 4096 * 1792, 10 / used)
        assert pricer.seconds(work, NO_TRAFFIC) == pytest.approx(seconds)
        assert simulate(scene, "resident").ops["experts"].seconds == pytest.approx(32 * seconds)
        assert hbm_bytes(work, NO_TRAFFIC) == pytest.approx(2 * 3 * used * 4096 * 1792)

    def test_on_gpus_that_share_the_model_each_reads_its_part(self) -> None:
        model = mixture()
        whole, part = (experts_work(one, one.experts, 4) for one in (model, model.shard(4)))  # type: ignore[arg-type]
        assert part == replace(whole, intermediate_size=1792 // 4)

    def test_the_roofline_reads_the_experts_in_use(self) -> None:
        model = mixture()
        roof = simulate(scene_of(model), "resident", executor="clock").roofline
        attended = 4 * 8192 * model.kv_bytes_per_token
        assert roof.hbm_bytes == pytest.approx(model.step_weight_bytes(4) + attended)
        attention = 4 * 8192 * 4 * 32 * 128 * 32
        assert roof.compute_s == pytest.approx((4 * 2 * model.token_weight_values + attention) / 989e12)

    def test_every_design_runs_and_says_how_tokens_are_sent(self) -> None:
        for name in presets.names("designs"):
            result = simulate(scene_of(mixture()), name)
            assert any("evenly and independently" in note for note in result.assumptions)

    def test_times_from_another_gpu_are_not_measured_ones(self) -> None:
        result = simulate(scene_of(mixture(), machine="a100"), "resident")
        assert result.ops["experts"].source == "assumed"
        assert any("times of experts, measured on NVIDIA H100" in note for note in result.assumptions)

    def test_a_profile_without_experts_is_named(self) -> None:
        scene = scene_of(mixture())
        bare = scene.profile.model_copy(update={"experts": None})
        with pytest.raises(SpecError, match=r"model\.experts: profile h200 has no times of experts"):
            simulate(replace(scene, profile=bare), "clo")


class TestPrefill:
    @staticmethod
    def prices(model: ModelSpec, chunk_tokens: int) -> Any:
        return prefill_prices(scene_of(model), presets.load_design("clo"), chunk_tokens=chunk_tokens)

    @pytest.mark.parametrize("tokens", [1, 300])
    def test_a_chunk_differs_by_what_takes_the_place_of_the_mlp(self, tokens: int) -> None:
        model = mixture(shared_intermediate_size=256)
        scene = scene_of(model)
        prices, profile = TablePrices(scene.profile, scene.machine), scene.profile  # type: ignore[arg-type]
        work = experts_work(model, model.experts, tokens)  # type: ignore[arg-type]
        mlp = [prices.seconds(Gemm(tokens, n, k)) for n, k in ((28672, 4096), (4096, 14336))]
        mixed = [prices.seconds(Gemm(tokens, n, k)) for n, k in ((512, 4096), (4096, 256), (16, 4096))]
        mixed.append(prices.seconds(work))
        small = profile.elementwise  # type: ignore[union-attr]
        rate = small.efficiency * scene.machine.gpu.hbm_bytes_per_s
        routed = small.latency_s + tokens * (3 * 256 - 3 * 14336 + 4 * 16) * 2 / rate
        expected = 32 * (sum(mixed) - sum(mlp) + routed)
        found = [self.prices(one, tokens).dense_ns[tokens] / 1e9 for one in (DENSE, model)]
        assert found[1] - found[0] == pytest.approx(expected, rel=1e-6, abs=2e-9)

    def test_first_layers_without_experts_take_an_mlp_each(self) -> None:
        none, some = (self.prices(mixture(dense_layers=dense), 300).dense_ns[300] for dense in (0, 10))
        dense = self.prices(DENSE, 300).dense_ns[300]
        assert some - none == pytest.approx((dense - none) * 10 / 32, abs=2)

    def test_experts_are_among_what_tables_price(self) -> None:
        share = [self.prices(model, 2048).table_share for model in (DENSE, mixture())]
        assert 0.5 < min(share) <= max(share) <= 1.0


class TestFit:
    def test_sizes_by_hand(self) -> None:
        points = np.array([[1.0, 64, 32, 2, 8, 1], [3.0, 64, 32, 2, 8, 2], [100.0, 64, 32, 2, 8, 1]])
        expected = [[3 * 2 * 64 * 32, 1.0], [3 * 6 * 64 * 16, 1.0], [3 * 8 * 64 * 32, 25.0]]
        np.testing.assert_allclose(points_of.sizes(points), expected)
        assert len(set(points_of.models(points).tolist())) == 1

    def test_a_known_law_is_recovered_also_for_models_left_out(self) -> None:
        samples = measurements.expert_samples(timed_experts(law, SHAPES))
        table, report = fit.fit_experts(samples, HARDWARE)
        assert report.median < 0.03
        assert report.p90 < 0.1
        for weights, rows in ((2e8, 1.0), (1.5e9, 3.0), (1e9, 900.0)):
            assert table.seconds(weights, rows) == pytest.approx(law(weights, rows), rel=0.1)

    def test_a_model_unlike_the_others_counts_in_the_errors(self) -> None:
        odd = timed_experts(lambda weights, rows: 3 * law(weights, rows), SHAPES[:1])
        usual = timed_experts(law, SHAPES[1:])
        both = {name: np.concatenate([odd[name], usual[name]]) for name in odd}
        _, report = fit.fit_experts(measurements.expert_samples(both), HARDWARE)
        assert report.p90 > 0.5

    def test_what_is_moved_to_a_node_stays_as_far_above_the_roofline(self) -> None:
        samples = measurements.expert_samples(timed_experts(law, SHAPES))
        empty = ExpertsTable.from_latencies([[1.0]], weight_values=(1.0,), rows=(1.0,), **HARDWARE)
        nodes = points_of.on_nodes(samples, empty.roofline_seconds)
        octaves = np.log2(nodes.points) * points_of.NODES_PER_OCTAVE
        np.testing.assert_allclose(octaves, np.round(octaves))
        np.testing.assert_allclose(nodes.seconds, law(*nodes.points.T), rtol=0.05)

    @pytest.mark.parametrize(
        ("column", "value"),
        [("moe_dtype", "fp8"), ("distribution", "power_law_1.2"), ("moe_ep_size", 2), ("moe_tp_size", 16)],
    )
    def test_what_is_not_comparable_is_left_out(self, column: str, value: Any) -> None:
        columns = timed_experts(law, SHAPES)
        columns[column] = np.where(columns["num_tokens"] == 64, value, columns[column])
        kept = measurements.expert_samples(columns)
        assert 64 not in kept.points[:, points_of.TOKENS]
        assert kept.points[:, points_of.GPUS].max() == 8

    def test_experts_without_a_gate_are_left_out(self) -> None:
        columns = timed_experts(law, [*SHAPES, (2688, 1856, 6, 128)])
        assert 1856 not in measurements.expert_samples(columns).points[:, points_of.WIDTH]

    @needs_measurements
    @pytest.mark.parametrize("gpu", list(measurements.GPUS))
    def test_shipped_tables_are_as_good_on_models_left_out_as_they_say(self, gpu: str) -> None:
        timed = fit.EXPERTS_OF.get(gpu, gpu)
        table, report = fit.fit_experts(measurements.read_experts(timed), measurements.read_hardware(timed))
        assert presets.load_named_profile(gpu).experts == table
        assert table.median_abs_relative_error == pytest.approx(report.median, abs=1e-4)
        assert report.median < 0.15


def test_equal_work_is_priced_once() -> None:
    work = experts_work(DENSE, experts_like(), 4)
    assert isinstance(work, Experts)
    assert hash(work) == hash(experts_work(DENSE, experts_like(), 4))
