"""Small random models with latent attention, which caches one vector a token for all heads; with an indexer, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from small import VOCABULARY

from clo import presets
from clo.engine.models.indexer import OLDEST
from clo.engine.models.network import Network
from clo.engine.versions import release_of
from clo.specs import Design

LAYERS, HEADS = 4, 6
RANK, ROPE, NOPE, VALUE, QUERY_RANK = 24, 8, 12, 10, 20
EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    # queries from the hidden state; positions as complex numbers
    "DeepseekV2": EXPERTS | {"q_lora_rank": None},
    "DeepseekV3": EXPERTS,
    "Glm4MoeLite": EXPERTS,
    # without experts
    "Youtu": {},
}


# so many heads that hardly a token has no positive product with any of them: such tokens would tie
INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 12}
WITH_INDEXER: dict[str, dict[str, Any]] = {
    "DeepseekV32": EXPERTS | INDEXER,
    # every other layer attends to what the one before it chose
    "GlmMoeDsa": EXPERTS | INDEXER | {"indexer_types": ["full", "shared", "full", "shared"]},
}


def latent_model(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Large weights make attention far from uniform. Skips where the library caches every head's keys and values."""
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this version of transformers has no {kind}")
    if kind in WITH_INDEXER and release_of(transformers.__version__) < OLDEST:
        pytest.skip("indexers of this version of transformers are refused")
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": RANK,
        "q_lora_rank": QUERY_RANK,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": VALUE,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
    } | dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**shape | (KINDS | WITH_INDEXER)[kind] | changes)
    )
    if not hasattr(model.model.layers[0].self_attn, "expand_kv"):
        pytest.skip("this version of transformers caches every head's keys and values")
    return _varied(model.eval()).to(dtype)


def indexer_design(name: str, network: Network, **changes: Any) -> Design:
    """What a file leaves open is as the model attends."""
    plain: dict[str, Any] = {"gqa_fold": "mean", "target_hit_rate": None}
    chosen, indexer = presets.load_design(name, network.spec), network.spec.indexer
    if chosen.prefetches_layers and indexer is not None and indexer.shared_layers:
        plain["prefetch_depth"] = 0
    return chosen.with_fields(**plain | changes)


def in_vectors(attention: Any, heads: torch.Tensor) -> torch.Tensor:
    """Rotated queries `[heads, tokens, nope + rope]` as they meet cached vectors, head by head."""
    of_heads = attention.kv_b_proj.weight.unflatten(0, (HEADS, NOPE + VALUE))
    mapped = [query[:, :NOPE] @ weight[:NOPE] for query, weight in zip(heads, of_heads, strict=True)]
    return torch.cat([torch.stack(mapped), heads[..., NOPE:]], -1)


def _varied(model: Any) -> Any:
    """Norms that are not ones, which a projection could swallow."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    return model
