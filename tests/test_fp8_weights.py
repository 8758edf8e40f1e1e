"""Weights in fp8: half the bytes, kernels of their own, and bf16 where those are not known or not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mixtures import HARDWARE, SHAPES, law, mixture, timed_experts
from tiny import NO_TRAFFIC

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.kernel_tables import ExpertsTable, GemmTable
from clo.pricing import Pricer, hbm_bytes
from clo.schedule import record_step
from clo.schedule.ops import experts_work
from clo.schedule.work import Experts, Gemm
from clo.specs import ModelSpec, model_from_hf_config
from clo_calibration.tables import experts as points_of
from clo_calibration.tables import fit, measurements
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving.prefill import prefill_prices

BF16 = presets.load_model("llama-3-8b")
FP8 = BF16.with_fields(weight_bytes_per_value=1.0)
OF_LAYERS = {"qkv_proj", "out_proj", "gate_up_proj", "down_proj"}


def scene_of(model: ModelSpec, machine: str = "h200") -> Scene:
    return clo_sim.make_scene(model, machine, context_tokens=8192, batch=4)


def pricer_of(scene: Scene) -> Pricer:
    return Pricer(scene.profile, scene.machine)  # type: ignore[arg-type]


class TestBytes:
    def test_layers_are_halved_embeddings_and_head_are_not(self) -> None:
        head = 128256 * 4096 * 2
        assert FP8.weight_bytes - 2 * head == (BF16.weight_bytes - 2 * head) / 2
        assert FP8.step_weight_bytes(4) - head == (BF16.step_weight_bytes(4) - head) / 2
        assert FP8.token_weight_values == BF16.token_weight_values

    def test_wider_weights_are_wide_everywhere(self) -> None:
        assert BF16.with_fields(weight_bytes_per_value=4.0).weight_bytes == 2 * BF16.weight_bytes

    def test_the_roofline_reads_them(self) -> None:
        roof = simulate(scene_of(FP8), "resident", executor="clock").roofline
        assert roof.hbm_bytes == pytest.approx(FP8.step_weight_bytes(4) + 4 * 8192 * FP8.kv_bytes_per_token)
        # two operations a weight and token, at half the time but in the head; four an element attended
        head, attention = 128256 * 4096, 8192 * 4 * 32 * 128 * 32
        values = (FP8.token_weight_values - head) / 2 + head
        assert roof.compute_s == pytest.approx(4 * (2 * values + attention) / 989e12)

    def test_kernels_move_weights_of_a_byte(self) -> None:
        assert hbm_bytes(Gemm(3, 5, 7, 1.0), NO_TRAFFIC) == 2 * (3 * 7 + 3 * 5) + 5 * 7
        assert hbm_bytes(Experts(2.0, 1.0, 8, 4, 1.0), NO_TRAFFIC) == 3 * 2 * 8 * 4


class TestStep:
    def test_projections_of_the_layers_run_in_fp8_and_nothing_else(self) -> None:
        for model in (FP8, mixture(shared_intermediate_size=64).with_fields(weight_bytes_per_value=1.0)):
            nodes = record_step(scene_of(model).plan(presets.load_design("resident"))).nodes
            works = {node.op.name: node.op.work for node in nodes}
            widths = {name: work.weight_bytes for name, work in works.items() if isinstance(work, Gemm | Experts)}
            expected = OF_LAYERS | ({"experts"} if model.experts else set())
            assert {name for name, width in widths.items() if width == 1.0} == expected
            assert set(widths) - expected == {"lm_head"} | ({"router_proj"} if model.experts else set())

    def test_a_step_differs_by_its_projections(self) -> None:
        wide, narrow = (simulate(scene_of(model), "resident", executor="clock") for model in (BF16, FP8))
        saved = sum(wide.ops[name].seconds - narrow.ops[name].seconds for name in OF_LAYERS)
        assert 0 < saved < wide.tpot_s
        assert wide.tpot_s - narrow.tpot_s == pytest.approx(saved, rel=1e-9)
        assert narrow.ops["down_proj"].source == "aiconfigurator"
        assert any("fp8 weights take the fastest" in note for note in narrow.assumptions)
        assert not any("fp8" in note for note in wide.assumptions)

    def test_prices_are_the_tables(self) -> None:
        scene = scene_of(FP8)
        table = scene.profile.gemm_fp8  # type: ignore[union-attr]
        assert table is not None
        assert pricer_of(scene).seconds(Gemm(4, 4096, 14336, 1.0), NO_TRAFFIC) == table.seconds(4, 4096, 14336)
        assert pricer_of(scene).seconds(Gemm(4, 4096, 14336), NO_TRAFFIC) > table.seconds(4, 4096, 14336)
        experts = experts_work(mixture(), mixture().experts, 4)  # type: ignore[arg-type]
        narrow = Experts(experts.num_used, experts.rows, 4096, 1792, 1.0)
        expected = scene.profile.experts_fp8.seconds(narrow.weight_values, narrow.rows)  # type: ignore[union-attr]
        assert pricer_of(scene).seconds(narrow, NO_TRAFFIC) == expected

    def test_without_times_of_their_own_they_take_those_of_bf16_with_fewer_bytes(self) -> None:
        wide, narrow = (simulate(scene_of(model, "a100"), "resident", executor="clock") for model in (BF16, FP8))
        assert 0.5 < narrow.tpot_s / wide.tpot_s < 0.8
        assert "weights of 1 bytes were not timed: bf16 kernels, scaled along their roofline, are taken" in (
            narrow.assumptions
        )
        assert (wide.ops["down_proj"].source, narrow.ops["down_proj"].source) == ("aiconfigurator", "assumed")
        assert narrow.measured_share < 0.5 < wide.measured_share

    def test_experts_alone_can_be_without_times(self) -> None:
        scene = scene_of(mixture().with_fields(weight_bytes_per_value=1.0))
        bare = scene.profile.model_copy(update={"experts_fp8": None})
        scene = clo_sim.make_scene(scene.model, "h200", context_tokens=8192, batch=4, profile=bare)
        notes = simulate(scene, "resident", executor="clock").assumptions
        said = "experts' weights of 1 bytes were not timed: bf16 kernels, scaled along their roofline, are taken"
        assert said in notes


def test_a_chunk_of_prefill_differs_by_its_projections() -> None:
    scenes = [scene_of(model) for model in (BF16, FP8)]
    found = [prefill_prices(scene, presets.load_design("clo"), chunk_tokens=256).dense_ns[256] for scene in scenes]
    prices, shapes = pricer_of(scenes[0]).tables, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    saved = sum(prices.seconds(Gemm(256, n, k)) - prices.seconds(Gemm(256, n, k, 1.0)) for n, k in shapes)
    assert (found[0] - found[1]) / 1e9 == pytest.approx(32 * saved, rel=1e-5)


class TestConfigs:
    CONFIG: ClassVar[dict[str, Any]] = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 512,
    }

    @pytest.mark.parametrize("nested", [False, True])
    def test_fp8_is_read(self, tmp_path: Path, nested: bool) -> None:
        quantized = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
        config = {"text_config": self.CONFIG} | quantized if nested else self.CONFIG | quantized
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = model_from_hf_config(tmp_path)
        assert model.weight_bytes_per_value == 1.0
        assert "fp8 weights" in model.source

    @pytest.mark.parametrize(("algorithm", "fp8"), [("FP8", True), (None, False)])
    def test_fp8_is_read_from_the_file_beside(self, tmp_path: Path, algorithm: str | None, fp8: bool) -> None:
        (tmp_path / "config.json").write_text(json.dumps(self.CONFIG))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
        assert (model_from_hf_config(tmp_path).weight_bytes_per_value == 1.0) == fp8

    @pytest.mark.parametrize("quantized", [{"quant_algo": "INT8"}, {"quant_method": "fp8", "quant_algo": "MIXED"}])
    def test_other_widths_are_refused_wherever_they_are_said(self, tmp_path: Path, quantized: dict[str, str]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(self.CONFIG | {"quantization_config": quantized}))
        with pytest.raises(SpecError, match="such weights are not known"):
            model_from_hf_config(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(self.CONFIG))
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantized}))
        with pytest.raises(SpecError, match="such weights are not known"):
            model_from_hf_config(tmp_path)


class TestTables:
    @pytest.mark.parametrize("kind", [GemmTable, ExpertsTable])
    def test_the_roofline_has_half_the_bytes_and_twice_the_arithmetic(self, kind: Any) -> None:
        axes = dict.fromkeys(kind.ARGUMENTS, (1.0,))
        wide, narrow = (
            kind.from_latencies(np.ones([1] * len(axes)), **axes, **HARDWARE, weight_bytes=width) for width in (2, 1)
        )
        few_rows, many_rows = ((1, 8192, 8192), (8192, 8192, 8192)) if kind is GemmTable else ((1e9, 1), (1e9, 1e4))
        assert narrow.roofline_seconds(*few_rows) == pytest.approx(wide.roofline_seconds(*few_rows) / 2, rel=1e-3)
        assert narrow.roofline_seconds(*many_rows) == pytest.approx(wide.roofline_seconds(*many_rows) / 2)

    @pytest.mark.parametrize("gpu", [gpu for gpu in measurements.GPUS if gpu not in fit.WITHOUT["experts_fp8"]])
    def test_wide_layers_of_a_few_rows_are_faster(self, gpu: str) -> None:
        profile = presets.load_named_profile(gpu)
        assert profile.gemm_fp8 is not None
        rows, n, k = np.meshgrid([8.0, 32.0, 64.0], [8192.0, 16384.0], [8192.0, 16384.0])
        ratio = profile.gemm_fp8.seconds(rows, n, k) / profile.gemm.seconds(rows, n, k)
        assert 0.4 < ratio.min() < ratio.max() < 0.9

    def test_the_faster_of_two_scalings_counts_and_slower_ones_than_bf16_do_not(self) -> None:
        columns = timed_experts(law, SHAPES)
        kinds = {}
        for kind, factor in (("fp8", 3.0), ("fp8_block", 0.6), ("bfloat16", 1.0)):
            kinds[kind] = columns | {
                "moe_dtype": np.full(len(columns["version"]), kind, dtype=object),
                "latency": factor * columns["latency"],
            }
        # one model was timed with one scale for each matrix only
        few = kinds["fp8_block"]["hidden_size"] != SHAPES[0][0]
        kinds["fp8_block"] = {name: values[few] for name, values in kinds["fp8_block"].items()}
        mixed = {name: np.concatenate([one[name] for one in kinds.values()]) for name in columns}
        fp8 = measurements.expert_samples(mixed, weights=measurements.FP8)
        bf16 = measurements.expert_samples(mixed)
        kept = points_of.no_slower(fp8, bf16)
        assert SHAPES[0][0] in fp8.points[:, points_of.HIDDEN]
        assert SHAPES[0][0] not in kept.points[:, points_of.HIDDEN]
        np.testing.assert_allclose(kept.seconds, 0.6 * law(*points_of.sizes(kept.points).T))
