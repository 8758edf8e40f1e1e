"""A random model small enough to decode thousands of steps, and designs that fit it."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from clo import presets
from clo.specs import Design, Selector

PAGE, SINKS, WINDOW = 4, 2, 10
LAYERS, KV_HEADS, GROUP, DIM, VOCABULARY = 4, 2, 3, 16, 61

SELECTORS = [selector for selector in Selector if selector is not Selector.INDEXER]
"""What pages of every model can be scored by: an indexer comes with the model's weights."""


EXPERTS: dict[str, dict[str, int]] = {
    "Glm4Moe": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "MiniMaxM2": {"num_local_experts": 4},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32},
}
"""Kinds of model with experts, two of which each token passes."""


def _with_experts(kind: str) -> Any:
    return getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")


def small_model(kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Large weights make attention far from uniform, so that what is attended matters."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": KV_HEADS * GROUP,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    } | changes
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "Phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    }
    config, model = kinds[kind] if kind in kinds else _with_experts(kind)
    shape |= EXPERTS[kind] | {"num_experts_per_tok": 2} if kind in EXPERTS else {}
    if kind in ("qwen2", "Olmoe", "Phi3"):
        shape.pop("head_dim")
        shape |= {"hidden_size": KV_HEADS * GROUP * DIM}
    return model(config(**shape)).to(dtype).eval()


def design(name: str, **changes: Any) -> Design:
    """A named design with small pages."""
    small = {
        "page_size": PAGE,
        "num_sink_tokens": SINKS,
        "recent_window_tokens": WINDOW,
        "gqa_fold": "mean",
        "target_hit_rate": None,
    }
    chosen = presets.load_design(name)
    if chosen.selects and chosen.dense_layers:
        small["dense_layers"] = 1
    return chosen.with_fields(**small | changes)


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids `[tokens]`."""
    return torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def dense_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of the model's own full attention, without a cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens[None]).logits[0]
    return logits
