"""Configs of models with an indexer: presets come out, and what is not known is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clo import presets
from clo.errors import SpecError
from clo.specs import ModelSpec, model_from_hf_config

GLM = presets.load_model("glm-5.2")


class TestConfigs:
    GLM_FIELDS: dict[str, Any] = {  # noqa: RUF012
        **{"model_type": "glm_moe_dsa", "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78},
        **{"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64, "vocab_size": 154880},
        **{"max_position_embeddings": 1048576, "q_lora_rank": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 192},
        **{"qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "moe_layer_freq": 1},
        **{"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "tie_word_embeddings": False},
        **{"indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3, "index_topk_freq": 4},
        **{"quantization_config": {"quant_method": "fp8"}},
    }

    @staticmethod
    def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
        (folder / "config.json").write_text(json.dumps(config))
        return model_from_hf_config(folder)

    @pytest.mark.parametrize("kind", [None, "deepseek_sparse_attention", "indexed_attention"])
    def test_the_config_of_a_preset_is_the_preset(self, tmp_path: Path, kind: str | None) -> None:
        kinds = {"layer_types": [kind] * 78} if kind else {}
        assert self.read(tmp_path, self.GLM_FIELDS | kinds).with_fields(name="glm-5.2", source=GLM.source) == GLM

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"index_topk": None}, "no field 'index_topk': an indexer needs it"),
            ({"index_n_heads": "32"}, "index_n_heads = '32': must be a whole number"),
            ({"indexer_types": None}, "index_topk_freq = 4: read from indexer_types only"),
            ({"indexer_types": ["full"] * 5}, "indexer_types: full or shared is expected for each layer"),
            ({"indexer_types": ["full"] * 77 + ["half"]}, "indexer_types = half: full or shared is expected"),
            ({"indexer_types": ["shared"] * 78}, "the first layer has nothing to share"),
            (
                {"layer_types": ["full_attention"] + ["indexed_attention"] * 77},
                "full_attention beside layers with an indexer is not modelled",
            ),
        ],
    )
    def test_what_is_not_known_is_refused(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            self.read(tmp_path, self.GLM_FIELDS | changes)
