"""Small random hybrid models: linear attention in some layers, gated attention to keys and values in the others."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from small import DIM, GROUP, KV_HEADS, VOCABULARY

LINEAR, FULL = "linear_attention", "full_attention"
LAYERS = (LINEAR, LINEAR, FULL, LINEAR, FULL, FULL, LINEAR, FULL)
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
}
SECTIONS = {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Next": EXPERTS | {"intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "Qwen3_5": {"intermediate_size": 64},
    "Qwen3_5Moe": EXPERTS,
}
VALUE_HEADS, KEY_HEADS, STATE_DIM, CONV = 4, 2, 8, 4


def hybrid_config(kind: str, *, layers: tuple[str, ...] = LAYERS, **changes: Any) -> Any:
    """Of a model with `layers` of these types."""
    config = getattr(transformers, f"{kind}Config" if kind == "Qwen3Next" else f"{kind}TextConfig")
    turns = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": KV_HEADS * GROUP,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "layer_types": list(layers),
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "linear_key_head_dim": STATE_DIM,
        "linear_value_head_dim": STATE_DIM,
        "linear_conv_kernel_dim": CONV,
        "rope_parameters": turns | ({} if kind == "Qwen3Next" else SECTIONS),
    } | dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    return config(**shape | KINDS[kind] | changes)


def hybrid_model(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Large weights make attention far from uniform; norms and decays differ from head to head."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(hybrid_config(kind, **changes)).eval()
    if dtype is torch.float64:
        # torch has no grouped product of such numbers
        model.config._experts_implementation = "eager"
    return _varied(model).to(dtype)


def seeing_model(kind: str = "Qwen3_5") -> Any:
    """A Qwen3.5 that reads images, too."""
    torch.manual_seed(0)
    eyes = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 48}
    config = getattr(transformers, f"{kind}Config")(
        text_config=hybrid_config(kind).to_dict(),
        vision_config=eyes | {"patch_size": 4},
        image_token_id=VOCABULARY - 1,
        video_token_id=VOCABULARY - 2,
        vision_start_token_id=VOCABULARY - 3,
        vision_end_token_id=VOCABULARY - 4,
        tie_word_embeddings=False,
    )
    return _varied(getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval())


def _varied(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.uniform_(0.0, 1.0)
            if name.endswith("A_log"):
                # memories of a few tokens, and of hundreds
                weight.uniform_(-6.0, 0.0)
            if name.endswith("lm_head.weight"):
                weight.normal_(std=0.3)
    return model
