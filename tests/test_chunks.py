"""Llama 4: attention within chunks, experts in every or every other layer, and what of its configs cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clo import presets
from clo.errors import SpecError
from clo.specs import ModelSpec, model_from_hf_config
from clo_sim import make_scene

SCOUT: dict[str, Any] = {
    "model_type": "llama4_text",
    "num_hidden_layers": 48,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "max_position_embeddings": 10485760,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "attention_chunk_size": 8192,
}
MAVERICK = SCOUT | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "max_position_embeddings": 1048576}


def read(folder: Path, text: dict[str, Any]) -> ModelSpec:
    """Within a config of a model that also sees, as they are released."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text}))
    return model_from_hf_config(folder)


@pytest.mark.parametrize(
    ("name", "config", "weights", "used"),
    # model cards: 109 B and 400 B, with eyes of 0.9 B; 17 B of them active
    [("llama-4-scout", SCOUT, 108e9, 17e9), ("llama-4-maverick", MAVERICK, 400e9, 17e9)],
)
class TestReleased:
    def test_presets_are_what_the_configs_say(
        self, tmp_path: Path, name: str, config: dict[str, Any], weights: float, used: float
    ) -> None:
        preset = presets.load_model(name)
        found = read(tmp_path, config)
        assert found == preset.with_fields(name=found.name, source=found.source)
        assert preset.weight_bytes / 2 == pytest.approx(weights, rel=5e-3)
        assert preset.token_weight_values + preset.vocab_size * preset.hidden_size == pytest.approx(used, rel=0.03)

    def test_what_a_config_leaves_out(
        self, tmp_path: Path, name: str, config: dict[str, Any], weights: float, used: float
    ) -> None:
        short = {key: value for key, value in config.items() if key not in ("no_rope_layers", "attention_chunk_size")}
        assert read(tmp_path, short) == read(tmp_path, config)
        step = config["interleave_moe_layer_step"]
        listed = config | {"moe_layers": list(range(step - 1, 48, step)), "interleave_moe_layer_step": 1}
        assert read(tmp_path, listed) == read(tmp_path, config)

    def test_a_quarter_of_the_layers_keeps_the_context(
        self, tmp_path: Path, name: str, config: dict[str, Any], weights: float, used: float
    ) -> None:
        model = read(tmp_path, config)
        assert model.whole_layers == tuple(range(3, 48, 4))
        assert model.window_tokens == 8192


@pytest.mark.parametrize("step", [1, 2])
def test_as_many_weights_as_the_library_makes(tmp_path: Path, step: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.Llama4TextConfig(
        **{"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
        **{"max_position_embeddings": 128, "num_local_experts": 4, "interleave_moe_layer_step": step},
        **{"attention_chunk_size": 16},
    )
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    spec = model_from_hf_config(tmp_path)
    matrices = sum(each.numel() for name, each in model.named_parameters() if "norm" not in name)
    assert spec.weight_bytes / 2 == matrices
    assert spec.window_tokens == 16
    assert [layer.self_attn.use_rope for layer in model.model.layers] == [
        int(layer in spec.windowed_layers) for layer in range(8)
    ]
    assert [layer.is_moe_layer for layer in model.model.layers] == [spec.experts_in(i) is not None for i in range(8)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_chunk_size": 0}, "attention_chunk_size = 0: must be a positive whole number"),
        ({"attention_chunk_size": None}, "attention_chunk_size = None: must be a positive whole number"),
        ({"no_rope_layer_interval": "4"}, "no_rope_layer_interval = '4': must be a positive whole number"),
        ({"interleave_moe_layer_step": True}, "interleave_moe_layer_step = True: must be a positive whole number"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: 2 of them, one for each of 48 layers is expected"),
        ({"no_rope_layers": 1}, "no_rope_layers = 1: must be a list of whole numbers"),
        ({"moe_layers": ["0"]}, r"moe_layers = \['0'\]: must be a list of whole numbers"),
        ({"no_rope_layers": [1] * 48}, "one that attends to the whole context"),
        ({"layer_types": ["mamba"] * 48}, "layer_types: mamba is not modelled"),
        ({"num_hidden_layers": "48"}, "num_hidden_layers|whole numbers"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        read(tmp_path, SCOUT | changes)


def test_only_whole_layers_grow_with_the_context() -> None:
    """Of five million tokens more, each GPU keeps those of twelve layers and of its own heads."""
    machine = presets.load_machine("h200").with_fields(tensor_parallel=4)
    near, far = (
        make_scene("llama-4-scout", machine, context_tokens=tokens, batch=1).plan(presets.load_design("resident"))
        for tokens in (10**6, 6 * 10**6)
    )
    assert near.memory.window == far.memory.window
    assert far.memory.dense_layers - near.memory.dense_layers == 5 * 10**6 * 12 * 2 * 2 * 128 * 2
