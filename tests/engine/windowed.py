"""Small random models some of whose layers have a sliding window, of every kind that is supported."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from small import DIM, GROUP, KV_HEADS, VOCABULARY

SLIDES, FULL = "sliding_attention", "full_attention"
LAYERS = (SLIDES, FULL, SLIDES, SLIDES, FULL, FULL)
WINDOW = 12
IMAGE = VOCABULARY - 1
OF_SINKS = -1.0, 5.0
TURNS: dict[str, Any] = {"rope_type": "default"}

KINDS: dict[str, dict[str, Any]] = {
    "Gemma2": {"attn_logit_softcapping": None, "query_pre_attn_scalar": 40, "tie_word_embeddings": False},
    # windowed and full layers rotate otherwise, and neither scales by its head's size
    "Gemma3": {
        "query_pre_attn_scalar": 40,
        "tie_word_embeddings": False,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            SLIDES: TURNS | {"rope_theta": 1e2},
        },
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": TURNS | {"rope_theta": 1e4}},
    "Ministral": {},
    "Olmo3": {},
    "Qwen2": {"use_sliding_window": True},
    # with experts in some layers only, the first and the last among them
    "Qwen2Moe with windows": {
        "use_sliding_window": True,
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"shared_expert_intermediate_size": 24, "mlp_only_layers": [1, 4]},
    },
    "Qwen3": {"use_sliding_window": True},
}


def windowed_config(kind: str, *, layers: tuple[str, ...] = LAYERS, window: int = WINDOW, **changes: Any) -> Any:
    """Of a model with `layers` of these types."""
    config = getattr(transformers, f"{_name(kind)}TextConfig" if kind == "Gemma3" else f"{_name(kind)}Config")
    heads = KV_HEADS * GROUP
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * DIM,
        "intermediate_size": 64,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "sliding_window": window,
        "layer_types": list(layers),
    } | dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    return config(**shape | KINDS[kind] | changes)


def _name(kind: str) -> str:
    """The library's."""
    return kind.split()[0]


def seeing_model() -> Any:
    """A Gemma 3 that reads images, too."""
    torch.manual_seed(0)
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=windowed_config("Gemma3"),
        vision_config=eyes | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=1,
        image_token_index=IMAGE,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def windowed_model(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Large weights make attention far from uniform; sinks take shares of all sizes."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{_name(kind)}ForCausalLM")(windowed_config(kind, **changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.uniform_(*OF_SINKS)
    return model.to(dtype)
