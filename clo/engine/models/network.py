"""A loaded `transformers` decoder taken apart into the operations of the schedule. Knows nothing about KV caches.

Works for models built like Llama, Qwen2, Qwen3 and Mistral: separate projections, grouped heads, rotary positions, a
gated MLP. Each operation runs the model's own modules.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from clo.engine.models.anatomy import (
    SINKS,
    attending,
    decoder_layers,
    has_gate,
    has_part,
    in_heads,
    project_query,
    text_decoder,
)
from clo.engine.models.hybrid import linear_of
from clo.engine.models.windows import windows_of
from clo.errors import SpecError
from clo.specs import ModelSpec
from clo.specs.hf_config import experts_of

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions of a step, as the model's rotary embedding gives them."""


class Network:
    """The weights of a decoder, operation by operation. Hidden states are `[batch, 1, hidden_size]`.

    Of one that stays `whole`, as its library runs it, the queries only are of use, whatever follows attention; some of
    its layers may have a sliding window, or linear attention and so no queries, and its attention may have sinks.
    """

    def __init__(self, model: Any, name: str = "", *, whole: bool = False) -> None:
        self.model = model
        self.layers = decoder_layers(model, whole=whole)
        self.decoder = text_decoder(model)
        if not whole:
            _check_mlp(model, self.layers)
        self.attentions = [layer.self_attn for layer in attending(self.layers)]
        _check_attention(model, self.attentions)
        self.spec = spec_of(model, name)
        first = self.attentions[0]
        self.scale = float(first.scaling)
        self.dtype: torch.dtype = first.q_proj.weight.dtype
        self.device: torch.device = first.q_proj.weight.device
        self._rotate = sys.modules[type(first).__module__].apply_rotary_pos_emb
        rotary = getattr(self.decoder, "rotary_emb", None)
        self._rotates_by_kind = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        if not whole:
            _check_alike(model, self.spec, self._rotates_by_kind)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie, by one of each layer: others after they were moved or loaded anew."""
        return tuple(int(attention.q_proj.weight.data_ptr()) for attention in self.attentions)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of one token a sequence, `[batch]` -> `[batch, 1, hidden_size]`."""
        hidden: torch.Tensor = self.decoder.embed_tokens(tokens[:, None])
        return hidden

    def rotation(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotation:
        """For the new token's position in each sequence, `[batch]`."""
        rotation: Rotation = self.decoder.rotary_emb(hidden, positions[:, None])
        return rotation

    @property
    def has_sinks(self) -> bool:
        """Whether attention has a logit of its own that takes a share of the softmax."""
        return hasattr(self.attentions[0], SINKS)

    def rotation_for(self, target: int, layer: int, given: Rotation, hidden: Any, positions: torch.Tensor) -> Rotation:
        """What layer `target` rotates by where `layer` is `given` its own: another, where kinds of layers differ in it.

        `positions` are those of `hidden`, `[batch, tokens]`.
        """
        if not self._rotates_by_kind:
            return given
        kinds = self.decoder.config.layer_types
        if kinds[target] == kinds[layer]:
            return given
        rotation: Rotation = self.decoder.rotary_emb(hidden, positions, kinds[target])
        return rotation

    def input_norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Before attention."""
        normed: torch.Tensor = self.layers[layer].input_layernorm(hidden)
        return normed

    def qkv(self, layer: int, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value before rotation, `[batch, heads, 1, head_dim]`."""
        attention = self.layers[layer].self_attn
        head_dim = attention.head_dim
        query, key, value = (
            in_heads(getattr(attention, f"{name}_proj")(normed), getattr(attention, f"{name}_norm", None), head_dim)
            for name in "qkv"
        )
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> Rotation:
        """Rotary positions into query and key."""
        rotated: Rotation = self._rotate(query, key, *rotation)
        return rotated

    def predicted_query(self, layer: int, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What `layer` would ask if an earlier layer's input were its own, `[batch, query_heads, head_dim]`."""
        query: torch.Tensor = project_query(self.layers[layer], hidden, rotation)[:, :, 0]
        return query.contiguous()

    def out_proj(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """Attention's contribution to the hidden state, from `[batch, query_heads, head_dim]`."""
        projected: torch.Tensor = self.layers[layer].self_attn.o_proj(attended.flatten(1)[:, None])
        return projected

    def post_norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Before the MLP."""
        normed: torch.Tensor = self.layers[layer].post_attention_layernorm(hidden)
        return normed

    def gate_up_proj(self, layer: int, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP's gate and what it gates."""
        mlp = self.layers[layer].mlp
        return mlp.gate_proj(normed), mlp.up_proj(normed)

    def activation(self, layer: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gated activation."""
        activated: torch.Tensor = self.layers[layer].mlp.act_fn(gate) * up
        return activated

    def down_proj(self, layer: int, activated: torch.Tensor) -> torch.Tensor:
        """The MLP's contribution to the hidden state."""
        projected: torch.Tensor = self.layers[layer].mlp.down_proj(activated)
        return projected

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """After the last layer."""
        normed: torch.Tensor = self.decoder.norm(hidden)
        return normed

    def lm_head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, vocab_size]`."""
        logits: torch.Tensor = self.model.lm_head(normed)[:, 0]
        return logits


def spec_of(model: Any, name: str = "") -> ModelSpec:
    """The `ModelSpec` of a loaded model. Raises `SpecError` for a model that is built differently."""
    layers, config = decoder_layers(model, whole=True), text_decoder(model).config
    linear = linear_of(model, layers, config)
    attention = attending(layers)[0].self_attn
    head_dim, weight = int(attention.head_dim), attention.q_proj.weight
    return ModelSpec.parse(
        {
            "name": name or model.config.name_or_path.rstrip("/").rsplit("/", 1)[-1] or type(model).__name__,
            "source": f"loaded {type(model).__name__}",
            "num_layers": len(layers),
            "hidden_size": config.hidden_size,
            # some leave out the width of an MLP that none of their layers has
            "intermediate_size": getattr(config, "intermediate_size", None) or config.moe_intermediate_size,
            "num_query_heads": weight.shape[0] // head_dim // (2 if has_gate(attention) else 1),
            "num_kv_heads": attention.k_proj.weight.shape[0] // head_dim,
            "head_dim": head_dim,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_position_embeddings,
            "experts": experts_of(config.to_dict()),
            "tied_embeddings": bool(config.tie_word_embeddings),
            "weight_bytes_per_value": float(weight.element_size()),
            "kv_bytes_per_value": float(weight.element_size()),
            **windows_of(config),
            **linear,
        }
    )


def _check_mlp(model: Any, layers: list[Any]) -> None:
    for part in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj"):
        if not all(has_part(layer, part) for layer in layers):
            raise SpecError(
                f"model {type(model).__name__}: layers lack {part}: not a Llama or Qwen-style model: "
                "clo.engine.offload leaves it whole"
            )


def _check_attention(model: Any, attentions: list[Any]) -> None:
    """Attention to keys and values must be a softmax over products with keys, on one scale in all layers."""
    for attention in attentions:
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap is not None:
            raise SpecError(
                f"model {type(model).__name__}: attention caps its logits, which is not supported "
                f"(attn_logit_softcapping = {cap})"
            )
    scales = {float(attention.scaling) for attention in attentions}
    if len(scales) > 1:
        raise SpecError(
            f"model {type(model).__name__}: layers scale attention differently ({sorted(scales)}): not supported"
        )


def _check_alike(model: Any, spec: ModelSpec, rotates_by_kind: bool) -> None:
    """Layers that are taken apart must all do the same."""
    if rotates_by_kind and not spec.windowed_layers:
        raise SpecError(
            f"model {type(model).__name__}: kinds of layers rotate differently: only clo.engine.offload takes such a "
            "model"
        )
    if spec.windowed_layers:
        raise SpecError(
            f"model {type(model).__name__}: attention of {len(spec.windowed_layers)} layers is limited to a sliding "
            f"window of {spec.window_tokens} tokens: only clo.engine.offload takes such a model"
        )
