"""What Llama and Qwen-style decoders of `transformers` are made of. Knows nothing about what is done with the parts."""

from __future__ import annotations

import sys
from typing import Any

from clo.errors import SpecError

SINKS = "sinks"
"""A weight of attention: a logit of each query head that takes its share of the softmax, and has no value (gpt-oss)."""
IN_ANOTHER = ("gemma3",)
"""Kinds of model that read images too: their text decoder, and its config, lie one level deeper."""


def text_decoder(model: Any) -> Any:
    """What has embeddings, layers and final norm; `None` where there is no such thing."""
    decoder: Any = getattr(model, "model", None)
    return getattr(decoder, "language_model", None) if model.config.model_type in IN_ANOTHER else decoder


def decoder_layers(model: Any, *, whole: bool = False) -> list[Any]:
    """The decoder layers, checked to be built as the recorder needs. Raises `SpecError` naming the missing part.

    Layers that stay `whole`, as their library runs them, may norm behind attention only, and attention may have sinks.
    """
    decoder = text_decoder(model) if whole else getattr(model, "model", None)
    layers = list(getattr(decoder, "layers", []))
    if not layers:
        raise SpecError(f"model {type(model).__name__}: no decoder layers at model.layers")
    for part in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
        for layer in layers:
            if not (has_part(layer, part) or (whole and part == "input_layernorm" and _norms_behind(layer))):
                raise SpecError(f"model {type(model).__name__}: layers lack {part}: not a Llama or Qwen-style model")
    for layer in layers:
        weights = (name for name, _ in layer.self_attn.named_parameters(recurse=False))
        own = ", ".join(name for name in weights if not (whole and name == SINKS))
        if own:
            raise SpecError(
                f"model {type(model).__name__}: attention has weights of its own ({own}): not a Llama or Qwen-style "
                "model"
            )
    return layers


def has_part(module: Any, path: str) -> bool:
    """Whether there is such an attribute of an attribute, and it is not none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


def _norms_behind(layer: Any) -> bool:
    """Whether attention reads the hidden state as it is, and what it gives is normed (OLMo 2 and 3)."""
    return has_part(layer, "post_attention_layernorm") and has_part(layer, "post_feedforward_layernorm")


def in_heads(projected: Any, norm: Any, head_dim: int) -> Any:
    """`[..., heads, head_dim]` of a projection, and of its norm, if there is one: of each head, or of all at once."""
    at_once = norm is not None and norm.weight.shape[-1] != head_dim
    heads = (norm(projected) if at_once else projected).unflatten(-1, (-1, head_dim))
    return heads if norm is None or at_once else norm(heads)


def project_query(layer: Any, hidden: Any, position_embeddings: tuple[Any, Any]) -> Any:
    """The rotated query [batch, num_query_heads, tokens, head_dim] that `layer` would form from `hidden`."""
    attention = layer.self_attn
    projected = attention.q_proj(layer.input_layernorm(hidden) if has_part(layer, "input_layernorm") else hidden)
    query = in_heads(projected, getattr(attention, "q_norm", None), attention.head_dim).transpose(1, 2)
    # the model's own function, for models that rotate only a part or in another order
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(query, query, *position_embeddings)[0]
