"""Prompts that are read once and taken in by many decoders. Knows nothing about designs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clo.engine.layers import Layer, OffloadedLayer
from clo.engine.layers.linear import Pair, empty_library_cache, states_of
from clo.engine.models.network import Network
from clo.engine.prefill import PREFILL_CHUNK_TOKENS
from clo.errors import SpecError


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt that has been read: what each layer keeps of it, and the logits of what follows.

    A layer's pair: rotated keys and values `[kv_heads, tokens, head_dim]`; of latent attention the values' share of
    its vectors `[1, tokens, kv_rank]` and their rest `[1, tokens, rope_dim]`; of linear attention what the convolution
    spans `[conv_width, conv_tokens]` and the states `[value_heads, key_dim, value_dim]`. `indexer_keys`: of
    each layer whose model's own indexer has keys, `[tokens, key_dim]`.
    """

    kv: tuple[Pair, ...]
    logits: torch.Tensor
    num_tokens: int
    indexer_keys: tuple[torch.Tensor | None, ...] = ()

    def load_into(self, layers: Sequence[Layer], sequence: int) -> None:
        """As their `sequence`."""
        for layer, (first, second) in zip(layers, self.kv, strict=True):
            layer.load(sequence, first, second)
        for layer, keys in zip(layers, self.indexer_keys, strict=False):
            if keys is not None and isinstance(layer, OffloadedLayer):
                layer.load_indexer_keys(sequence, keys)


def read_prompt(
    network: Network,
    tokens: torch.Tensor,
    *,
    known: Prompt | None = None,
    shared: int = 0,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Prompt:
    """Prefill in chunks with the model's own attention. Raises `SpecError` for a prompt that is empty or too long.

    The first `shared` tokens are those of the prompt `known`, which has been read: they are not read again, unless the
    model has linear attention, whose states are those of the end, or rotates texts of these two lengths differently.
    """
    spec = network.spec
    if not 1 <= len(tokens) <= spec.max_positions:
        raise SpecError(f"prompt of {len(tokens)} tokens: {spec.name} takes 1 to {spec.max_positions}")
    if not 0 <= shared < len(tokens) or shared > (known.num_tokens if known else 0):
        raise SpecError(f"prompt of {len(tokens)} tokens: {shared} of them cannot be shared with what has been read")
    linear = spec.linear_flags
    is_alike = known is None or network.longest_alike(known.num_tokens) == network.longest_alike(len(tokens))
    first = 0 if any(linear) or not is_alike else shared
    cache, logits = empty_library_cache(linear, indexed=spec.indexer is not None), torch.empty(0)
    with torch.inference_mode():
        for layer, (keys, values) in enumerate(known.kv if known and first else ()):
            cache.update(keys[None, :, :first], values[None, :, :first], layer)
        for layer, keys in enumerate(known.indexer_keys if known and first else ()):
            if keys is not None:
                cache.update_indexer(keys[None, :first], layer)
        for start in range(first, len(tokens), chunk_tokens):
            chunk = tokens[None, start : start + chunk_tokens].to(network.device)
            logits = network.read(chunk, cache, len(tokens))
    kept = (_kept(layer, is_linear) for layer, is_linear in zip(cache.layers, linear, strict=True))
    indexed = tuple(map(_indexer_keys, cache.layers)) if spec.indexer is not None else ()
    return Prompt(tuple(kept), logits[0, -1], len(tokens), indexed)


def _indexer_keys(layer: Any) -> torch.Tensor | None:
    return None if layer.indexer_keys is None else layer.indexer_keys[0]


def _kept(layer: Any, is_linear: bool) -> Pair:
    first, second = states_of(layer) if is_linear else (layer.keys, layer.values)
    return first[0], second[0]
