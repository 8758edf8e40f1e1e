"""Models from Hugging Face configs, and those that are not modelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clo.errors import SpecError
from clo.specs import model_from_hf_config

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}

QWEN = {
    "model_type": "qwen2",
    "num_hidden_layers": 48,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
}


class TestConfigs:
    def test_a_hugging_face_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        for where in (tmp_path, tmp_path / "config.json"):
            model = model_from_hf_config(where)
            assert model.name == tmp_path.name
            assert (model.head_dim, model.num_kv_heads, model.kv_bytes_per_token) == (128, 8, 131072)

    def test_a_qwen_config(self, tmp_path: Path) -> None:
        path = tmp_path / "qwen.json"
        path.write_text(json.dumps(QWEN))
        model = model_from_hf_config(path)
        assert (model.name, model.num_layers, model.group_size, model.head_dim) == ("qwen", 48, 5, 128)
        assert model.kv_bytes_per_token == 48 * 8 * 2 * 128 * 2
        assert model.max_positions == 32768
        # tied: one matrix for embedding and head; Q, O of 40 heads, K, V of 8, three MLP matrices
        layer = 5120 * 128 * (2 * 40 + 2 * 8) + 3 * 5120 * 13824
        assert model.weight_bytes == 2 * (48 * layer + 152064 * 5120)

    @pytest.mark.parametrize(
        "config",
        [
            LLAMA | {"num_attention_heads": 0},
            LLAMA | {"num_attention_heads": "32"},
            LLAMA | {"hidden_size": None},
            {"text_config": None},
        ],
        ids=["no heads", "text", "null", "null text_config"],
    )
    def test_a_config_of_the_wrong_values(self, tmp_path: Path, config: dict[str, Any]) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        with pytest.raises(SpecError, match=r"config\.json: "):
            model_from_hf_config(path)

    @pytest.mark.parametrize(("kind", "tied"), [("cohere2", True), ("gemma", True), ("llama", False), ("phi3", False)])
    def test_embeddings_are_tied_by_default_where_they_are(self, tmp_path: Path, kind: str, tied: bool) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": kind}))
        assert model_from_hf_config(tmp_path).tied_embeddings == tied

    def test_variants_of_a_config(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"text_config": LLAMA | {"head_dim": 64, "num_key_value_heads": None}}))
        model = model_from_hf_config(path)
        assert (model.head_dim, model.num_kv_heads) == (64, 32)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_local_experts": 8}, "num_local_experts = 8: experts of model_type = None are not known"),
            ({"num_experts": 128}, "num_experts = 128: experts of model_type = None are not known"),
            ({"n_routed_experts": 256}, "n_routed_experts = 256: experts of model_type = None"),
            ({"kv_lora_rank": 512}, "kv_lora_rank = 512: latent attention"),
            (
                {"quantization_config": {"bits": 4}},
                "quantization_config: quant_method = None: such weights are not known",
            ),
            ({"sliding_window": 4096}, "sliding_window = 4096: which layers have it is not said"),
            ({"model_type": "starcoder2"}, "model_type = 'starcoder2': its MLP has no gate"),
            ({"model_type": "phi"}, "model_type = 'phi': its MLP has no gate"),
            ({"model_type": "new", "hidden_act": "relu2"}, "hidden_act = 'relu2': of MLPs without a gate"),
            ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096"),
            (
                {"layer_types": ["full_attention", "sliding_attention"]},
                "layer_types: windows of model_type = None are not known",
            ),
            ({"layer_types": ["linear_attention"] * 4}, "layer_types: linear_attention"),
            ({"head_dim": 0}, "model.head_dim = 0: Input should be greater than 0"),
            ({"head_dim": -64}, "model.head_dim = -64: Input should be greater than 0"),
            ({"num_key_value_heads": 0}, "model.num_kv_heads = 0: Input should be greater than 0"),
            ({"num_attention_heads": 24}, "hidden_size = 4096 is no multiple of num_attention_heads = 24"),
            ({"num_hidden_layers": True}, "model.num_layers = True: must be a number"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_a_model_beyond_what_is_modelled_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], problem: str
    ) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA | changes))
        with pytest.raises(SpecError) as failure:
            model_from_hf_config(path)
        assert str(failure.value).startswith(f"{path}: {problem}")

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_experts": 0, "num_local_experts": None, "kv_lora_rank": None, "quantization_config": None},
            {"sliding_window": None},
            {"sliding_window": 8192},
            {"sliding_window": 4096, "use_sliding_window": False},
            {"model_type": "qwen3", "sliding_window": 4096},
            {"sliding_window": 4096, "layer_types": ["full_attention"] * 32},
            {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 128},
        ],
        ids=lambda value: "-".join(value),
    )
    def test_a_switch_that_is_off_is_no_obstacle(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA | changes))
        model = model_from_hf_config(path)
        assert (model.num_layers, model.head_dim) == (32, 128)
        assert "bf16" in model.source

    @pytest.mark.parametrize("missing", list(LLAMA)[:4])
    def test_a_config_without_a_field(self, tmp_path: Path, missing: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in LLAMA.items() if name != missing}))
        with pytest.raises(SpecError, match=f"config.json: no field '{missing}'"):
            model_from_hf_config(path)
