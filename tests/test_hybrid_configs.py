"""Configs of hybrid models: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clo.errors import SpecError
from clo.specs import LinearSpec, ModelSpec, model_from_hf_config

QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 4,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "mamba_ssm_dtype": "float32",
}
MOE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 384,
    "mlp_only_layers": [],
}
LINEAR = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 64}


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return model_from_hf_config(folder)


def test_a_text_model_within_one_that_sees(tmp_path: Path) -> None:
    model = read(tmp_path, {"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": QWEN3_5})
    assert model.linear == LinearSpec(layers=(0, 1, 2), **LINEAR)
    assert model.gated_attention
    assert model.tied_embeddings
    assert (model.window_tokens, model.windowed_layers) == (None, ())


def test_experts_whose_config_leaves_out_the_width_of_an_mlp(tmp_path: Path) -> None:
    config = {name: value for name, value in QWEN3_5.items() if name != "intermediate_size"}
    model = read(tmp_path, config | MOE)
    assert model.experts is not None
    assert model.experts.model_dump() == {
        "num_experts": 256,
        "experts_per_token": 8,
        "intermediate_size": 512,
        "shared_intermediate_size": 384,
        "dense_layers": 0,
        "layers": (),
        "weight_bytes_per_value": None,
    }
    with pytest.raises(SpecError, match="no field 'intermediate_size'"):
        read(tmp_path, config)


@pytest.mark.parametrize(("interval", "places"), [(None, (0, 1, 2, 4)), (2, (0, 2, 4)), (1, None)])
def test_without_a_list_every_so_many_layers_one_has_keys_and_values(
    tmp_path: Path, interval: int | None, places: tuple[int, ...] | None
) -> None:
    config = QWEN3_5 | {"model_type": "qwen3_next", "num_hidden_layers": 5, "num_experts": 0}
    changes = {"layer_types": None, "full_attention_interval": interval} | MOE | {"model_type": "qwen3_next"}
    model = read(tmp_path, config | changes)
    assert (None if model.linear is None else model.linear.layers) == places
    assert model.gated_attention


def test_states_may_be_kept_in_bf16(tmp_path: Path) -> None:
    model = read(tmp_path, QWEN3_5 | {"mamba_ssm_dtype": "bfloat16"})
    assert model.linear is not None
    assert model.linear.state_bytes_per_value == 2.0


@pytest.mark.parametrize("kind", ["Qwen3_5", "Qwen3_5Moe", "Qwen3Next"])
def test_as_many_weights_as_the_library_makes(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    name = f"{kind}TextConfig" if kind.startswith("Qwen3_5") else f"{kind}Config"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    experts = {} if kind == "Qwen3_5" else {"num_experts": 8, "num_experts_per_tok": 2}
    config = getattr(transformers, name)(
        **{"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 12},
        **{"linear_value_head_dim": 10, "shared_expert_intermediate_size": 24, "max_position_embeddings": 128},
        **experts,
    )
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    spec = model_from_hf_config(tmp_path)
    assert spec.linear is not None
    assert spec.linear.layers == (0, 1, 2)
    # of a few values for each head or expert, and of the short convolution, nothing is counted
    small = ("norm", "conv1d", "A_log", "dt_bias", "shared_expert_gate")
    matrices = sum(each.numel() for name, each in model.named_parameters() if not any(part in name for part in small))
    tied = 64 * 32 if spec.tied_embeddings else 0
    assert spec.weight_bytes / 2 == matrices + (
        tied if model.lm_head.weight is not model.model.embed_tokens.weight else 0
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "qwen3"}, "layer_types: linear_attention of model_type = 'qwen3' is not known"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types: one for each layer is expected, and one with keys"),
        ({"layer_types": ["full_attention"]}, "layer_types: one for each layer is expected, and one with keys"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "sliding_attention beside linear_attention"),
        ({"attn_output_gate": False}, "attn_output_gate = False"),
        (
            # as Nemotron-H, Bamba and Falcon-H1, whose configs have no layer_types
            {"model_type": "nemotron_h", "layer_types": None, "mamba_num_heads": 256, "ssm_state_size": 256},
            "mamba_ssm_dtype = 'float32': layers with Mamba's states are not modelled",
        ),
        ({"linear_key_head_dim": None}, "no field 'linear_key_head_dim': linear attention needs it"),
        ({"linear_num_value_heads": "32"}, "linear_num_value_heads = '32': must be a whole number"),
        ({"linear_num_value_heads": 24}, "num_value_heads = 24 must be a multiple of num_key_heads = 16"),
        ({"full_attention_interval": 2.5}, "full_attention_interval = 2.5: must be a whole number"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        read(tmp_path, QWEN3_5 | changes)
