"""A loaded `transformers` decoder taken apart into the operations of the schedule. Knows nothing about KV caches.

Works for models built like Llama, Mistral and Qwen: separate projections, grouped heads, rotary positions, a gated MLP
or experts; for Gemma 3, gpt-oss and OLMo, and for Qwen's hybrids. Each operation runs the model's own modules.
"""

from __future__ import annotations

import copy
import inspect
import sys
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch

from clo.engine.models.anatomy import (
    AS_THEY_ARE,
    SINKS,
    Norms,
    attending,
    decoder_layers,
    has_gate,
    has_part,
    in_heads,
    is_fused,
    is_latent,
    norm_names,
    project_query,
    projected,
    text_decoder,
)
from clo.engine.models.fused import Turn, fused_norms, fused_rotation, one_launch
from clo.engine.models.hybrid import linear_of
from clo.engine.models.indexer import Indexer, Seen, indexer_of
from clo.engine.models.latent import LatentAttention
from clo.engine.models.library import as_cache
from clo.engine.models.longrope import as_of, host_chooses, longest_alike, switches_of
from clo.engine.models.mlp import Mlp
from clo.engine.models.windows import windows_of
from clo.errors import SpecError
from clo.specs import ModelSpec
from clo.specs.hf_config import experts_of

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions of a step, as the model's rotary embedding gives them."""


BY_POSITION = "llama_4_scaling_beta"
"""The field of `rope_parameters` that says how much queries far behind are scaled up (Ministral 3)."""


class Asked(NamedTuple):
    """Query, key and value `[batch, heads, 1, head_dim]`, no value where the key is both (latent attention).

    The gate of what attention gives is `[batch, 1, query_heads * head_dim]`, if it has one.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    gate: torch.Tensor | None = None

    def kept(self, rotated_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is stored of the one token, `[batch, kv_heads, head_dim]` each."""
        value = None if self.value is None else self.value[:, :, 0].contiguous()
        return rotated_key[:, :, 0].contiguous(), value


class Network:
    """The weights of a decoder, operation by operation. Hidden states are `[batch, 1, hidden_size]`.

    Some of its layers may have a sliding window, or linear attention and so no queries; attention may have sinks, and
    a gate. Of one that stays `whole`, as its library runs it, the queries only are of use, whatever follows attention.
    """

    def __init__(self, model: Any, name: str = "", *, whole: bool = False) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.decoder = text_decoder(model)
        self.attentions = [layer.self_attn for layer in attending(self.layers)]
        _check_attention(model, self.attentions)
        self.spec = spec_of(model, name)
        if whole and self.spec.indexer is not None:
            raise SpecError(
                f"model {type(model).__name__}: attention to what a model's own indexer chooses is decoded step by "
                "step only (clo generate, clo run, clo.engine.Decoder), not recorded nor offloaded within transformers"
            )
        self._mlps = [] if whole else _taken_apart(model, self.layers, self.spec)
        first = self.attentions[0]
        self.scale = float(first.scaling)
        self.dtype: torch.dtype = first.o_proj.weight.dtype
        self.device: torch.device = first.o_proj.weight.device
        self._library = sys.modules[type(first).__module__]
        rotary = getattr(self.decoder, "rotary_emb", None)
        self._rotates_by_kind = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        self._norm_names = [norm_names(layer) for layer in self.layers]
        self._switches = switches_of(self.decoder.config)
        self._norms: Norms = AS_THEY_ARE
        self._turn: Turn | None = None
        if one_launch(self.device) and not whole:
            self._norms = fused_norms(self.layers, self.decoder.norm, self.dtype)
            self._turn = self._fused_rotation()

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the weights lie, by one of each layer: others after they were moved or loaded anew."""
        return tuple(int(attention.o_proj.weight.data_ptr()) for attention in self.attentions)

    def read(self, part: torch.Tensor, cache: Any, length: int) -> torch.Tensor:
        """The model reads a part `[1, tokens]` of a text of `length` tokens into the library's `cache`.

        Logits `[1, 1, vocab_size]` of what follows.
        """
        with as_of(self.decoder.rotary_emb, length) if self._switches else nullcontext():
            told = self.model(part, use_cache=True, logits_to_keep=1, **as_cache(self.model, cache))
        logits: torch.Tensor = told.logits
        return logits

    def longest_alike(self, tokens: int) -> int:
        """Positions that a text may grow to which is of `tokens` tokens: beyond, it would be rotated otherwise."""
        return longest_alike(self._switches, tokens, self.spec.max_positions)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of one token a sequence, `[batch]` -> `[batch, 1, hidden_size]`."""
        hidden: torch.Tensor = self.decoder.embed_tokens(tokens[:, None])
        return hidden

    def rotations(self, hidden: torch.Tensor, positions: torch.Tensor) -> list[Rotation]:
        """For the new token's position in each sequence, `[batch]`, of every layer: kinds of layers may differ."""
        if not self._rotates_by_kind:
            rotary, places = self.decoder.rotary_emb, positions[:, None]
            # of text and of both sides of images: some versions of the library do not expand them themselves
            places = places.expand(3, -1, -1) if hasattr(rotary, "mrope_section") else places
            return [rotary(hidden, places)] * len(self.layers)
        kinds = self.decoder.config.layer_types
        of_kind = {kind: self.decoder.rotary_emb(hidden, positions[:, None], kind) for kind in set(kinds)}
        return [of_kind[kind] for kind in kinds]

    @property
    def has_sinks(self) -> bool:
        """Whether attention has a logit of its own that takes a share of the softmax."""
        return hasattr(self.attentions[0], SINKS)

    @property
    def host_sees_experts(self) -> bool:
        """Whether a CUDA device's host must know which experts were chosen: where they are called one after the other
        ("eager"), or in one grouped product of other values than bf16, which torch loops over."""
        by = getattr(self.decoder.config, "_experts_implementation", None)
        loops = by == "eager" or (by == "grouped_mm" and self.dtype is not torch.bfloat16)
        return loops and any(mlp.has_experts for mlp in self._mlps)

    @property
    def host_sees_positions(self) -> bool:
        """Whether a CUDA device's host must know how long the texts are, which chooses how they are rotated."""
        return bool(self._switches) and host_chooses()

    def sink_logits(self, layer: int) -> torch.Tensor | None:
        """Those logits, `[query_heads]`, if there are any."""
        return getattr(self.layers[layer].self_attn, SINKS, None)

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
        return self._normed(layer, "input_layernorm", hidden)

    def qkv(self, layer: int, normed: torch.Tensor) -> Asked:
        """What the layer asks for and leaves, before rotation."""
        if self.spec.latent is not None:
            latent = self.latent(layer)
            vector = latent.normed_vector(latent.vector(normed))
            return self.mapped(layer, latent.queries(latent.normed_low(latent.low(normed))), vector)
        attention = self.layers[layer].self_attn
        head_dim, gate = attention.head_dim, None
        queries, keys, values = projected(attention, normed)
        if has_gate(attention):
            queries, gate = (part.flatten(-2) for part in queries.unflatten(-1, (-1, 2, head_dim)).unbind(-2))
        query = in_heads(queries, self._norm_in(attention, "q_norm"), head_dim)
        key = in_heads(keys, self._norm_in(attention, "k_norm"), head_dim)
        value = in_heads(values, self._norm_in(attention, "v_norm"), head_dim)
        return Asked(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), gate)

    def latent(self, layer: int) -> LatentAttention:
        """The parts of a layer with latent attention."""
        return LatentAttention(self.layers[layer].self_attn, self._norms)

    def indexer(self, layer: int) -> Indexer | None:
        """The indexer of such a layer, if it has one of its own."""
        module = getattr(self.layers[layer].self_attn, "indexer", None)
        return None if module is None else Indexer(module)

    def seen(self, layer: int, normed: torch.Tensor, rotation: Rotation) -> Seen:
        """What the indexer of such a layer reads of the newest token."""
        latent = self.latent(layer)
        return Seen(normed, latent.normed_low(latent.low(normed)), rotation)

    def mapped(self, layer: int, queries: torch.Tensor, vector: torch.Tensor) -> Asked:
        """What such a layer asks for and leaves, before rotation."""
        latent = self.latent(layer)
        return Asked(latent.map_queries(latent.in_heads(queries)), vector[:, None], None)

    def of_cache(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """What meets cached keys of the library's rotated queries `[batch, query_heads, tokens, query_dim]`."""
        return query if self.spec.latent is None else self.latent(layer).map_queries(query)

    def values(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """Of what attention gives, `[..., query_heads, value_dim]`, every head's own."""
        return attended if self.spec.latent is None else self.latent(layer).map_outputs(attended)

    def rotate(self, query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> Rotation:
        """Rotary positions into query and key, of one token in each sequence where that can be done in one launch."""
        if self._turn is not None and query.shape[2] == 1:
            return self._turn(query, key, rotation)
        return self._rotate_as_the_model(query, key, rotation)

    def _rotate_as_the_model(self, query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> Rotation:
        if self.spec.latent is not None:
            return self.latent(self.spec.whole_layers[0]).rotate(query, key, rotation)
        rotated: Rotation = self._library.apply_rotary_pos_emb(query, key, *rotation)
        return rotated

    def predicted_query(self, layer: int, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What `layer` would ask if an earlier layer's input were its own, `[batch, query_heads, head_dim]`."""
        query: torch.Tensor = project_query(self.layers[layer], hidden, rotation, norms=self._norms, turn=self._turn)[
            :, :, 0
        ]
        return query.contiguous()

    def check_predicts(self) -> None:
        """Raise `SpecError` for a model whose queries are made otherwise than by the parts that are known here."""
        layer = self.spec.whole_layers[-1]
        hidden = torch.zeros(1, 1, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        try:
            with torch.inference_mode():
                rotation = self.rotations(hidden, torch.zeros(1, dtype=torch.int64, device=self.device))[layer]
                found = self.predicted_query(layer, hidden, rotation).shape[1:]
        except (RuntimeError, AttributeError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise SpecError(f"model {type(self.model).__name__}: its queries cannot be predicted: {why}") from error
        if tuple(found) != (self.spec.num_query_heads, self.spec.head_dim):
            raise SpecError(f"model {type(self.model).__name__}: its queries cannot be predicted: shape {list(found)}")

    def output_gate(self, attended: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """As much of what attention gives, `[batch, query_heads, head_dim]`, as the gate says; all of it without."""
        return attended if gate is None else attended * torch.sigmoid(gate[:, 0].view_as(attended))

    def out_proj(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """Attention's contribution to the hidden state, from `[batch, query_heads, value_dim]`."""
        projected: torch.Tensor = self.layers[layer].self_attn.o_proj(attended.flatten(1)[:, None])
        return self._normed_behind(layer, self._norm_names[layer].behind_attention, projected)

    def linear_attention(self, layer: int, normed: torch.Tensor, states: Any) -> torch.Tensor:
        """The contribution of a layer with linear attention, all of it: projections, states, gate.

        `states`: the library's cache, which has those of the batch.
        """
        module = self.layers[layer].linear_attn
        given: torch.Tensor = module(normed, **as_cache(module, states))
        return given

    def post_norm(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Before the MLP."""
        return self._normed(layer, self._norm_names[layer].before_mlp, hidden)

    def mlp(self, layer: int) -> Mlp:
        """What follows attention; of a model that is taken apart."""
        return self._mlps[layer]

    def of_mlp(self, layer: int, given: torch.Tensor) -> torch.Tensor:
        """The contribution to the hidden state of all that the MLP gives."""
        return self._normed_behind(layer, self._norm_names[layer].behind_mlp, given)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """After the last layer."""
        normed: torch.Tensor = self._norm_in(self.decoder, "norm")(hidden)
        return normed

    def lm_head(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, vocab_size]`."""
        logits: torch.Tensor = self.model.lm_head(normed)[:, 0]
        return logits

    def after_attention(self, layer: int, hidden: torch.Tensor, contribution: torch.Tensor) -> torch.Tensor:
        """The hidden state behind a layer whose attention contributes this to it."""
        hidden = hidden + contribution
        return hidden + self.of_mlp(layer, self._mlps[layer].all(self.post_norm(layer, hidden)))

    def with_layer(self, layer: int, module: Any) -> Network:
        """The same with `module` as that layer."""
        other = copy.copy(self)
        other.layers, other._mlps = [*self.layers], [*self._mlps]
        other.layers[layer], other._mlps[layer] = module, Mlp(module.mlp, type(self.model).__name__)
        return other

    def _normed(self, layer: int, norm: str, hidden: torch.Tensor) -> torch.Tensor:
        """As it is, where a layer norms behind its parts only."""
        module = self._norm_in(self.layers[layer], norm)
        return hidden if module is None else module(hidden)

    def _normed_behind(self, layer: int, norm: str, given: torch.Tensor) -> torch.Tensor:
        return self._norm_in(self.layers[layer], norm)(given) if norm else given

    def _norm_in(self, owner: Any, name: str) -> Any:
        """That norm, or what stands for it; `None` where there is no such norm."""
        module = getattr(owner, name, None)
        return self._norms.get(module, module)

    def _fused_rotation(self) -> Turn | None:
        hidden = torch.zeros(2, 1, self.spec.hidden_size, dtype=self.dtype, device=self.device)
        places = torch.tensor([1, min(1000, self.spec.max_positions - 1)], device=self.device)
        first = 0 if self.spec.latent is None else self.spec.latent.kv_rank
        given = {"like": hidden, "head_dim": self.spec.head_dim, "first": first}
        # a model that rotates in a way unknown here is refused where that is used, and says why
        with suppress(RuntimeError, AttributeError, TypeError, ValueError), torch.inference_mode():
            rotation = self.rotations(hidden, places)[self.spec.whole_layers[0]]
            return fused_rotation(self._rotate_as_the_model, rotation, **given)
        return None


def spec_of(model: Any, name: str = "") -> ModelSpec:
    """The `ModelSpec` of a loaded model. Raises `SpecError` for a model that is built differently."""
    layers, config = decoder_layers(model), text_decoder(model).config
    linear = linear_of(model, layers, config)
    attention = attending(layers)[0].self_attn
    weight = attention.o_proj.weight
    return ModelSpec.parse(
        {
            "name": name or model.config.name_or_path.rstrip("/").rsplit("/", 1)[-1] or type(model).__name__,
            "source": f"loaded {type(model).__name__}",
            "num_layers": len(layers),
            "hidden_size": config.hidden_size,
            # some leave out the width of an MLP that none of their layers has
            "intermediate_size": getattr(config, "intermediate_size", None) or config.moe_intermediate_size,
            "vocab_size": config.vocab_size,
            "max_positions": config.max_position_embeddings,
            "experts": experts_of(config.to_dict()),
            "tied_embeddings": bool(getattr(config, "tie_word_embeddings", False)),
            "weight_bytes_per_value": float(weight.element_size()),
            "kv_bytes_per_value": float(weight.element_size()),
            **(_latent_heads(model, attention) if is_latent(attention) else _heads(attention)),
            **indexer_of([layer.self_attn for layer in attending(layers)]),
            **windows_of(config),
            **linear,
        }
    )


def _heads(attention: Any) -> dict[str, Any]:
    head_dim = int(attention.head_dim)
    if is_fused(attention):
        kv_heads = int(attention.num_key_value_heads)
        heads = attention.qkv_proj.weight.shape[0] // head_dim
        return {"num_query_heads": heads - 2 * kv_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    return {
        "num_query_heads": attention.q_proj.weight.shape[0] // head_dim // (2 if has_gate(attention) else 1),
        "num_kv_heads": attention.k_proj.weight.shape[0] // head_dim,
        "head_dim": head_dim,
    }


def _latent_heads(model: Any, attention: Any) -> dict[str, Any]:
    if not has_part(attention, "expand_kv"):
        raise SpecError(
            f"model {type(model).__name__}: this version of transformers caches every head's keys and values, not the "
            "vectors that they are made from: 5.15 or newer is needed"
        )
    shape = LatentAttention(attention).spec
    return {
        "num_query_heads": attention.num_heads,
        "num_kv_heads": 1,
        "head_dim": shape.vector_dim,
        "latent": shape,
    }


def advice(spec: ModelSpec) -> str:
    """What to do with a model that cannot be taken apart: behind a message, if anything helps."""
    return ": use clo.engine.offload, which leaves it whole" if spec.indexer is None else ""


def _taken_apart(model: Any, layers: list[Any], spec: ModelSpec) -> list[Mlp]:
    """What follows attention in each layer. Raises `SpecError` for layers that are not what `spec` says."""
    name, elsewhere = type(model).__name__, advice(spec)
    for part in ("post_attention_layernorm", "mlp"):
        if not all(has_part(layer, part) for layer in layers):
            raise SpecError(f"model {name}: layers lack {part}: not a Llama or Qwen-style model{elsewhere}")
    turns = getattr(text_decoder(model).config, "rope_parameters", None) or {}
    if turns.get(BY_POSITION):
        # asked by name: versions of the library before 5.5 scale by positions that a short text has not
        raise SpecError(
            f"model {name}: queries are scaled by their position ({BY_POSITION} = {turns[BY_POSITION]}): taken apart "
            f"it computes something else{elsewhere}"
        )
    mlps = [Mlp(layer.mlp, name) for layer in layers]
    for layer, mlp in enumerate(mlps):
        if mlp.has_experts != (spec.experts_in(layer) is not None) or mlp.is_gated != bool(spec.mlp_width(layer)):
            raise SpecError(
                f"model {name}: layer {layer} has other MLPs or experts than its config says (experts are all alike)"
                f"{elsewhere}"
            )
    return mlps


def _check_attention(model: Any, attentions: list[Any]) -> None:
    """Attention must be a softmax over products with keys, on one scale and in heads of one shape in all layers."""
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
    for layer, shape in enumerate(shapes := [_shape(attention) for attention in attentions]):
        if shape != shapes[0]:
            raise SpecError(
                f"model {type(model).__name__}: layers differ in their heads (of those that attend the first is "
                f"{_in_words(shapes[0])}, number {layer + 1} {_in_words(shape)}): not supported"
            )


def _shape(attention: Any) -> tuple[tuple[int, ...], ...]:
    """Of the weights that heads come from, and that take what they give."""
    parts = ("qkv_proj", "q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    return tuple(tuple(getattr(attention, name).weight.shape) for name in parts if has_part(attention, name))


def _in_words(shape: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, sizes)) for sizes in shape)
