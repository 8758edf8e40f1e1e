"""What Llama and Qwen-style decoders of `transformers` are made of. Knows nothing about what is done with the parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from clo.errors import SpecError
from clo.specs.hf_attention import WITH_LINEAR

SINKS = "sinks"
"""A weight of attention: a logit of each query head that takes its share of the softmax, and has no value (gpt-oss)."""
NEEDED = ("q_proj.weight", "k_proj.weight", "o_proj.weight", "head_dim", "scaling")
"""Of each attention to keys and values."""
NEEDED_OF_FUSED = ("qkv_proj.weight", "o_proj.weight", "head_dim", "num_key_value_heads", "scaling")
"""Of each that has one projection for queries, keys and values."""
NEEDED_OF_LATENT = ("kv_a_proj_with_mqa.weight", "kv_a_layernorm", "kv_b_proj.weight", "o_proj.weight", "scaling")
"""Of each that caches one vector a token for all heads."""
FUSED = ("phi3",)
"""Kinds of model with one projection for queries, keys and values, one behind the other."""
IN_ANOTHER = ("gemma3", "qwen3_5", "qwen3_5_moe")
"""Kinds of model that read images too: their text decoder, and its config, lie one level deeper."""


Norms = Mapping[Any, Any]
"""By module of a norm, what computes the same."""
AS_THEY_ARE: Norms = MappingProxyType({})


def text_decoder(model: Any) -> Any:
    """What has embeddings, layers and final norm; `None` where there is no such thing."""
    decoder: Any = getattr(model, "model", None)
    return getattr(decoder, "language_model", None) if model.config.model_type in IN_ANOTHER else decoder


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers, checked to attend as Llama's or Qwen's. Raises `SpecError` naming the missing part.

    Layers may norm behind attention only, attention may have sinks, a gate or a window, or be linear.
    """
    layers = list(getattr(text_decoder(model), "layers", []))
    if not layers:
        raise SpecError(f"model {type(model).__name__}: no decoder layers at model.layers")
    softmax = attending(layers)
    if not softmax:
        raise SpecError(f"model {type(model).__name__}: no layer has keys and values")
    for layer in softmax:
        own = ", ".join(name for name, _ in _own_weights(layer) if name != SINKS)
        if own:
            raise SpecError(
                f"model {type(model).__name__}: attention has weights of its own ({own}): not a Llama or Qwen-style "
                "model"
            )
    for layer in softmax:
        attention = getattr(layer, "self_attn", None)
        needed = NEEDED_OF_LATENT if is_latent(attention) else NEEDED_OF_FUSED if is_fused(attention) else NEEDED
        missing = [] if has_part(layer, "input_layernorm") or norm_names(layer).behind_mlp else ["input_layernorm"]
        missing += [f"self_attn.{part}" for part in needed if not has_part(attention, part)]
        if missing:
            raise SpecError(f"model {type(model).__name__}: layers lack {missing[0]}: not a Llama or Qwen-style model")
    return layers


def is_latent(attention: Any) -> bool:
    """Whether it caches one vector a token for all heads."""
    return has_part(attention, "kv_a_proj_with_mqa")


def is_fused(attention: Any) -> bool:
    """Whether one projection gives queries, keys and values."""
    return getattr(getattr(attention, "config", None), "model_type", None) in FUSED and has_part(attention, "qkv_proj")


def projected(attention: Any, normed: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values of all heads, `[..., heads * head_dim]`; queries with their gates, if there are any."""
    if not is_fused(attention):
        return attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    width = attention.num_key_value_heads * attention.head_dim
    queries, keys, values = attention.qkv_proj(normed).tensor_split((-2 * width, -width), -1)
    return queries, keys, values


def _own_weights(layer: Any) -> list[tuple[str, Any]]:
    attention = getattr(layer, "self_attn", None)
    return [] if attention is None else list(attention.named_parameters(recurse=False))


def attending(layers: list[Any]) -> list[Any]:
    """Those that do not have linear attention instead of keys and values."""
    return [layer for layer in layers if not has_part(layer, "linear_attn")]


def has_gate(attention: Any) -> bool:
    """Whether the projection of queries gives each head's gate, too, behind its query."""
    return getattr(getattr(attention, "config", None), "model_type", None) in WITH_LINEAR


def has_part(module: Any, path: str) -> bool:
    """Whether there is such an attribute of an attribute, and it is not none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is not None


class NormNames(NamedTuple):
    """What a layer calls its norms by where they stand: of what attention and MLP read, and of what they give."""

    behind_attention: str
    before_mlp: str
    behind_mlp: str


BEFORE_ONLY = NormNames("", "post_attention_layernorm", "")
"""Llama's: nothing is normed behind."""
BEHIND = (
    # Gemma's; OLMo's layers have none before
    NormNames("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    # GLM-4-32B's
    NormNames("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)


def norm_names(layer: Any) -> NormNames:
    """Of a layer: those of the first kind all of whose norms behind its parts it has."""
    kinds = (each for each in BEHIND if has_part(layer, each.behind_attention) and has_part(layer, each.behind_mlp))
    return next(kinds, BEFORE_ONLY)


def in_heads(projected: Any, norm: Any, head_dim: int) -> Any:
    """`[..., heads, head_dim]` of a projection, and of its norm, if there is one: of each head, or of all at once."""
    at_once = norm is not None and norm.weight.shape[-1] != head_dim
    heads = (norm(projected) if at_once else projected).unflatten(-1, (-1, head_dim))
    return heads if norm is None or at_once else norm(heads)


def project_query(
    layer: Any,
    hidden: Any,
    position_embeddings: tuple[Any, Any],
    *,
    norms: Norms = AS_THEY_ARE,
    turn: Callable[..., Any] | None = None,
) -> Any:
    """The rotated query [batch, num_query_heads, tokens, head_dim] that `layer` would form from `hidden`.

    By its own modules, but for those that `norms` stand for, and by `turn`, if there is one.
    """
    attention = layer.self_attn
    norm = getattr(layer, "input_layernorm", None)
    normed = hidden if norm is None else norms.get(norm, norm)(hidden)
    if is_latent(attention):
        from clo.engine.models.latent import LatentAttention  # needs torch, which the commands ask for by name

        return LatentAttention(attention, norms).query(normed, position_embeddings, turn)
    queries = projected(attention, normed)[0] if is_fused(attention) else attention.q_proj(normed)
    if has_gate(attention):
        queries = queries.unflatten(-1, (-1, 2, attention.head_dim))[..., 0, :].flatten(-2)
    own = getattr(attention, "q_norm", None)
    query = in_heads(queries, norms.get(own, own), attention.head_dim).transpose(1, 2)
    if turn is not None:
        return turn(query, query[:, :1], position_embeddings)[0]
    # the model's own function, for models that rotate only a part or in another order
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(query, query[:, :1], *position_embeddings)[0]
