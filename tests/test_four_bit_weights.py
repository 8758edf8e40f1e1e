"""Weights of four bits: what a model takes, what prices it, and what configs of such models say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.profile import Profile
from clo.schedule import record_step
from clo.schedule.work import Experts, Gemm
from clo.specs import ModelSpec, model_from_hf_config
from clo.specs.hf_weights import MXFP4, NVFP4
from clo.table_prices import TablePrices
from clo_calibration.tables.experts import no_faster_than_memory, no_slower
from clo_calibration.tables.measurements import Samples
from clo_sim.run import simulate
from clo_sim.scene import Scene

LLAMA, MIXTURE, M3 = (presets.load_model(name) for name in ("llama-3-8b", "qwen3-30b-a3b", "minimax-m3"))
MLP = {"gate_up_proj", "down_proj"}
AROUND = {"qkv_proj", "out_proj"}


def experts_of(model: ModelSpec, weight_bytes: float) -> ModelSpec:
    assert model.experts is not None
    return model.with_fields(experts=model.experts.with_fields(weight_bytes_per_value=weight_bytes).model_dump())


def scene_of(model: ModelSpec, machine: str = "b200") -> Scene:
    return clo_sim.make_scene(model, machine, context_tokens=8192, batch=4)


def profile_of(scene: Scene) -> Profile:
    assert isinstance(scene.profile, Profile)
    return scene.profile


class TestBytes:
    def test_parts_have_widths_of_their_own(self) -> None:
        mixture, experts = MIXTURE, MIXTURE.experts
        assert experts is not None
        of_experts = 48 * 128 * 3 * 2048 * 768
        assert mixture.weight_bytes - experts_of(mixture, NVFP4).weight_bytes == of_experts * (2 - NVFP4)
        dense = LLAMA.with_fields(mlp_weight_bytes_per_value=1.0)
        assert LLAMA.weight_bytes - dense.weight_bytes == 32 * 3 * 4096 * 14336
        narrow = LLAMA.with_fields(weight_bytes_per_value=NVFP4)
        assert narrow.mlp_weight_bytes == NVFP4
        assert narrow.weight_bytes == 2 * 2 * 128256 * 4096 + NVFP4 * (LLAMA.weight_bytes / 2 - 2 * 128256 * 4096)

    def test_a_step_reads_the_experts_that_it_uses(self) -> None:
        narrow = experts_of(MIXTURE, NVFP4)
        assert MIXTURE.experts is not None
        used = MIXTURE.experts.used_by(4) * 48 * 3 * 2048 * 768
        assert MIXTURE.step_weight_bytes(4) - narrow.step_weight_bytes(4) == pytest.approx(used * (2 - NVFP4))

    @pytest.mark.parametrize(
        ("name", "values", "of_a_token", "checkpoint"),
        [("gpt-oss-120b", 116.83e9, 5.13e9, 60.8), ("gpt-oss-20b", 20.91e9, 3.61e9, 12.8)],
    )
    def test_gpt_oss_is_as_large_as_its_makers_say(
        self, name: str, values: float, of_a_token: float, checkpoint: float
    ) -> None:
        """Table 1 of the model card (arXiv 2508.10925): parameters, those that a token passes, checkpoints in GiB."""
        model = presets.load_model(name)
        narrow = experts_of(model.with_fields(weight_bytes_per_value=2.0), 2.0)
        assert narrow.weight_bytes / 2 == pytest.approx(values, rel=2e-3)
        assert model.token_weight_values == pytest.approx(of_a_token, rel=1e-2)
        assert model.weight_bytes / 2**30 == pytest.approx(checkpoint, rel=1e-2)

    def test_minimax_m3_is_as_large_as_its_release_in_four_bits(self) -> None:
        # 250.1 GB of files, of which vision takes 1
        assert experts_of(M3, NVFP4).weight_bytes == pytest.approx(249e9, rel=0.01)


class TestStep:
    @pytest.mark.parametrize(
        ("model", "expected"),
        [
            (LLAMA.with_fields(weight_bytes_per_value=NVFP4), dict.fromkeys(AROUND | MLP, NVFP4) | {"lm_head": 2.0}),
            (
                LLAMA.with_fields(weight_bytes_per_value=1.0, mlp_weight_bytes_per_value=NVFP4),
                dict.fromkeys(AROUND, 1.0) | dict.fromkeys(MLP, NVFP4) | {"lm_head": 2.0},
            ),
            (
                experts_of(MIXTURE, MXFP4),
                dict.fromkeys(AROUND, 2.0) | {"lm_head": 2.0, "router_proj": 2.0, "experts": MXFP4},
            ),
        ],
    )
    def test_every_product_has_the_width_of_its_weights(self, model: ModelSpec, expected: dict[str, float]) -> None:
        nodes = record_step(scene_of(model).plan(presets.load_design("resident"))).nodes
        works = {node.op.name: node.op.work for node in nodes}
        widths = {name: work.weight_bytes for name, work in works.items() if isinstance(work, Gemm | Experts)}
        assert widths == expected

    def test_no_step_is_shorter_than_its_roofline(self) -> None:
        for model in (LLAMA.with_fields(weight_bytes_per_value=NVFP4), experts_of(MIXTURE, NVFP4)):
            for machine in ("b200", "h200"):
                found = simulate(scene_of(model, machine), "resident-sparse", executor="clock")
                assert found.roofline is not None
                assert found.roofline.seconds < found.tpot_s


class TestPrices:
    def test_they_are_the_tables_where_there_are_some(self) -> None:
        scene = scene_of(LLAMA)
        table, prices = profile_of(scene).gemm_4bit, TablePrices(profile_of(scene), scene.machine)
        assert table is not None
        for width in (0.5, MXFP4, NVFP4, 0.625):
            assert prices.seconds(Gemm(4, 4096, 14336, width)) == table.seconds(4, 4096, 14336)
            assert prices.measured_here(Gemm(4, 4096, 14336, width))
        for width in (0.75, 4.0):
            assert not prices.measured_here(Gemm(4, 4096, 14336, width))

    @given(m=st.integers(1, 8192), n=st.sampled_from([1024, 4096, 28672]), k=st.sampled_from([4096, 14336]))
    def test_elsewhere_they_are_fewer_bytes_of_the_same_kernel(self, m: int, n: int, k: int) -> None:
        scene = scene_of(LLAMA, "h200")
        prices, wide = TablePrices(profile_of(scene), scene.machine), Gemm(m, n, k)
        narrow = Gemm(m, n, k, NVFP4)
        floor, there = profile_of(scene).gemm.floor_s, prices.seconds(wide)
        bound = [max((2 * (m * k + m * n) + width * k * n) / 4.8e12, 2 * m * n * k / 989e12) for width in (2.0, NVFP4)]
        assert prices.seconds(narrow) == pytest.approx(floor + (there - floor) * bound[1] / bound[0], rel=1e-3)
        assert not prices.measured_here(narrow)
        assert prices.measured_here(wide)

    def test_what_was_not_timed_is_said(self) -> None:
        narrow = LLAMA.with_fields(weight_bytes_per_value=NVFP4)
        here, there = (simulate(scene_of(narrow, name), "resident", executor="clock") for name in ("b200", "h200"))
        assert "4-bit weights take the fastest 4-bit kernels that were timed, whatever scales they need" in (
            here.assumptions
        )
        assert "weights of 0.5625 bytes were not timed: bf16 kernels, scaled along their roofline, are taken" in (
            there.assumptions
        )
        assert here.ops["down_proj"].source == "aiconfigurator"
        assert there.ops["down_proj"].source == "assumed"

    @pytest.mark.parametrize("gpu", [gpu for gpu in presets.names("profiles") if gpu != "cpu"])
    def test_experts_of_four_bits_were_timed_everywhere(self, gpu: str) -> None:
        table = presets.load_named_profile(gpu).experts_4bit
        assert table is not None
        assert (table.weight_bytes, table.arithmetic_bytes) == (
            NVFP4,
            0.5 if gpu in ("gb200", "b200", "rtx-pro-6000") else 2.0,
        )
        # a layer's experts, all in use: faster than twice the bytes in bf16, slower than the memory
        values = 128 * 3 * 6144 * 3072.0
        wide = presets.load_named_profile(gpu).experts
        assert wide is not None
        assert NVFP4 * values / table.hbm_bytes_per_s < table.seconds(values, 4.0) < 0.5 * wide.seconds(values, 4.0)


class TestSamples:
    POINTS = np.array([[1.0, 64.0, 32.0, 2.0, 8.0, 1.0], [4.0, 64.0, 32.0, 2.0, 8.0, 1.0]])

    def samples(self, *seconds: float) -> Samples:
        return Samples(points=self.POINTS[: len(seconds)], seconds=np.array(seconds), labels={})

    def test_what_no_memory_could_read_is_left_out(self) -> None:
        # two experts of 64 x 32, three products: 12,288 weights of half a byte at a byte a second; then all eight
        found = no_faster_than_memory(self.samples(6143.0, 24576.0), 0.5, 1.0)
        assert found.seconds.tolist() == [24576.0]

    def test_points_that_the_others_have_not_may_stay(self) -> None:
        timed, others = self.samples(2.0, 3.0), self.samples(1.0)
        assert no_slower(timed, others).seconds.tolist() == []
        assert no_slower(timed, others, unmatched=True).seconds.tolist() == [3.0]


CONFIG: dict[str, Any] = {
    **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    **{"vocab_size": 100, "max_position_embeddings": 512, "model_type": "qwen3_moe", "num_experts": 8},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
FLOAT8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "group_size": 32}


class TestConfigs:
    @pytest.mark.parametrize(
        ("quantized", "widths"),
        [
            ({"quant_algo": "NVFP4"}, (NVFP4, NVFP4, NVFP4)),
            ({"quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.0.self_attn*"]}, (2, NVFP4, NVFP4)),
            (
                {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.1.self_attn*", "*.mlp.shared_expert.*"]},
                (2, 2, NVFP4),
            ),
            # a router is not an MLP, and the gate of a shared expert not the expert
            (
                {"quant_algo": "NVFP4", "ignore": ["model.layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate"]},
                (NVFP4, NVFP4, NVFP4),
            ),
            (
                {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
                (2, MXFP4, MXFP4),
            ),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": INT4}},
                    "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"],
                },
                (2, 2, 0.5625),
            ),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
                },
                (1, 1, 1),
            ),
            ({"quant_method": "awq", "bits": 4, "group_size": 128}, (0.5 + 2.5 / 128,) * 3),
            (
                {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        "model.layers.0.self_attn.q_proj": {"quant_algo": "MXFP8"},
                        "model.layers.0.mlp.shared_experts.up_proj": {"quant_algo": "FP8"},
                        "model.layers.0.mlp.experts.3.w1": {"quant_algo": "NVFP4"},
                        "lm_head": {"quant_algo": "FP8"},
                    },
                },
                (1, 1, NVFP4),
            ),
            ({"quant_algo": "FP8", "exclude_modules": ["model.layers.0.mlp.gate"]}, (1, 1, 1)),
        ],
    )
    @pytest.mark.parametrize("beside", [False, True])
    def test_widths_are_read(
        self, tmp_path: Path, quantized: dict[str, Any], widths: tuple[float, ...], beside: bool
    ) -> None:
        if beside and "quant_algo" not in quantized:
            pytest.skip("ModelOpt alone writes a file beside the config")
        inside = {} if beside else {"quantization_config": quantized}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | inside))
        if beside:
            (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantized}))
        model = model_from_hf_config(tmp_path)
        assert (model.weight_bytes_per_value, model.mlp_weight_bytes, model.expert_weight_bytes) == widths

    @pytest.mark.parametrize(
        ("quantized", "weights", "cache"),
        [
            ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, NVFP4, 1),
            ({"quant_algo": "FP8", "kv_cache_quant_algo": None}, 1, 2),
            ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, 2, 1),
            ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FLOAT8}, 2, 1),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": FLOAT8 | {"strategy": "channel"}}},
                    "kv_cache_scheme": FLOAT8 | {"dynamic": False, "strategy": "tensor"},
                },
                1,
                1,
            ),
            ({"quant_method": "fp8", "kv_cache_scheme": FLOAT8}, 1, 1),
            ({"quant_algo": "FP8", "kv_cache_scheme": "FP8"}, 1, 1),
        ],
    )
    def test_caches_are_read(self, tmp_path: Path, quantized: dict[str, Any], weights: float, cache: float) -> None:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantized}))
        model = model_from_hf_config(tmp_path)
        assert (model.weight_bytes_per_value, model.kv_bytes_per_value) == (weights, cache)
        assert f"{'fp8' if cache == 1 else 'bf16'} KV" in model.source

    @pytest.mark.parametrize(
        ("cache", "problem"),
        [
            ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo = 'NVFP4': such caches .* with kv_bytes_per_value"),
            ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme = .*: such caches are not known"),
            ({"kv_cache_scheme": "INT8"}, "kv_cache_scheme = 'INT8': such caches are not known"),
        ],
    )
    def test_unknown_caches_are_refused(self, tmp_path: Path, cache: dict[str, Any], problem: str) -> None:
        quantized = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"} | cache}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | quantized))
        with pytest.raises(SpecError, match=problem):
            model_from_hf_config(tmp_path)

    @pytest.mark.parametrize(
        ("quantized", "problem"),
        [
            ({"quant_algo": "W4A8_AWQ"}, "quant_algo = 'W4A8_AWQ': such weights are not known"),
            ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes': such weights are not known"),
            ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "known with 4 bits in groups only"),
            ({"quant_method": "awq", "bits": 4, "group_size": -1}, "known with 4 bits in groups only"),
            ({"quant_method": "compressed-tensors"}, "config_groups: one with weights is expected"),
            (
                {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INT4 | {"num_bits": 3}}}},
                "weights of num_bits = 3",
            ),
            ({"quant_algo": "MIXED_PRECISION"}, "no quantized_layers say which"),
            (
                {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        "layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
                        "layers.1.self_attn.q_proj": {"quant_algo": "NVFP4"},
                    },
                },
                "weights of attention have 2 widths",
            ),
            ({"quant_algo": "NVFP4", "ignore": "lm_head"}, "a list of what is not quantised is expected"),
            ([1], r"\[1\]: a JSON object is expected"),
        ],
    )
    def test_what_is_not_known_is_refused(self, tmp_path: Path, quantized: Any, problem: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantized}))
        with pytest.raises(SpecError, match=problem):
            model_from_hf_config(tmp_path)
