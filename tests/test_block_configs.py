"""Configs of MiniMax-M3, as released and as Transformers writes them: the preset comes out, the unknown is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clo import presets
from clo.errors import SpecError
from clo.specs import IndexerSpec, ModelSpec, model_from_hf_config

M3 = presets.load_model("minimax-m3").with_fields(weight_bytes_per_value=2.0)
FIRST_DENSE = [0] * 3 + [1] * 57
TEXT: dict[str, Any] = {
    **{"hidden_size": 6144, "intermediate_size": 3072, "dense_intermediate_size": 12288, "num_hidden_layers": 60},
    **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 200064},
    **{"max_position_embeddings": 1048576, "num_local_experts": 128, "num_experts_per_tok": 4},
    **{"shared_intermediate_size": 3072, "tie_word_embeddings": False, "attention_output_gate": False},
}
SPARSE: dict[str, Any] = {
    **{"use_sparse_attention": True, "sparse_index_dim": 128, "sparse_num_index_heads": 4, "sparse_topk_blocks": 16},
    **{"sparse_block_size": 128, "sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1},
    **{"sparse_attention_freq": FIRST_DENSE},
}
RELEASED = {
    "model_type": "minimax_m3_vl",
    "text_config": TEXT | {"n_shared_experts": 1, "moe_layer_freq": FIRST_DENSE, "sparse_attention_config": SPARSE},
}
WRITTEN = {
    "model_type": "minimax_m3_vl",
    "text_config": TEXT
    | {"model_type": "minimax_m3_vl_text", "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57}
    | {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57, "index_n_heads": 4}
    | {"index_head_dim": 128, "index_block_size": 128, "index_topk_blocks": 16, "index_local_blocks": 1},
}


def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return model_from_hf_config(folder)


@pytest.mark.parametrize("config", [RELEASED, WRITTEN])
def test_the_config_of_the_preset_is_the_preset(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, config).with_fields(name=M3.name, source=M3.source) == M3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sparse_init_block": 1}, "sparse_init_block = 1: known with 0 only"),
        ({"sparse_score_type": "sum"}, "sparse_score_type = 'sum': known with 'max' only"),
        ({"use_sparse_attention": False}, "use_sparse_attention = False: known with True only"),
        ({"sparse_topk_blocks": "16"}, "sparse_topk_blocks = '16': an indexer of blocks needs a whole number"),
        ({"sparse_attention_freq": None}, "full_attention or minimax_m3_sparse is expected for each layer"),
        ({"sparse_attention_freq": [1] * 59}, "is expected for each layer"),
        ({"sparse_attention_freq": [0, 1, 0] + [1] * 57}, "must be the first ones, not all"),
        ({"sparse_attention_freq": [0] * 60}, "must be the first ones, not all"),
        ({"sparse_num_index_heads": 2}, "indexer.num_heads = 2 must be num_kv_heads = 4"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    text = RELEASED["text_config"] | {"sparse_attention_config": SPARSE | changes}  # type: ignore[operator]
    with pytest.raises(SpecError, match=problem):
        read(tmp_path, RELEASED | {"text_config": text})


def test_experts_may_be_in_any_layers(tmp_path: Path) -> None:
    text = RELEASED["text_config"] | {"moe_layer_freq": [0, 1, 0] + [1] * 57}  # type: ignore[operator]
    experts = read(tmp_path, RELEASED | {"text_config": text}).experts
    assert experts is not None
    assert experts.layers == (1, *range(3, 60))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attention_output_gate": True}, "attention_output_gate = True: not modelled beside an indexer"),
        ({"sparse_attention_config": [1]}, r"sparse_attention_config = \[1\]: a JSON object is expected"),
        ({"index_local_blocks": 2}, "index_local_blocks = 2: known with 1 only"),
    ],
)
def test_so_is_what_beside_it_is_not_known(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        read(tmp_path, RELEASED | {"text_config": RELEASED["text_config"] | changes})  # type: ignore[operator]


def test_as_many_weights_as_the_library_makes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.12")
    torch = pytest.importorskip("torch")
    kinds = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]
    config = transformers.MiniMaxM3VLTextConfig(
        **{"hidden_size": 32, "intermediate_size": 12, "dense_intermediate_size": 48, "shared_intermediate_size": 20},
        **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"vocab_size": 64, "max_position_embeddings": 128, "num_local_experts": 6, "num_experts_per_tok": 2},
        **{"mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": kinds, "rotary_dim": 4},
        **{"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 3},
    )
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = model_from_hf_config(tmp_path)
    matrices = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    assert spec.weight_bytes / 2 == matrices
    assert spec.indexer == IndexerSpec(
        num_heads=2, head_dim=16, top_tokens=12, block_tokens=4, key_bytes=32, dense_layers=1
    )
