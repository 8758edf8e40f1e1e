"""Prompts that are read once and taken in by many decoders. Knows nothing about designs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo.engine.models.network import Network
from clo.engine.prefill import PREFILL_CHUNK_TOKENS
from clo.errors import SpecError


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt that has been read: rotated keys and values `[kv_heads, tokens, head_dim]` by layer, and the logits."""

    kv: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    logits: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.kv[0][0].shape[1])


def read_prompt(
    network: Network,
    tokens: torch.Tensor,
    *,
    known: Prompt | None = None,
    shared: int = 0,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> Prompt:
    """Prefill in chunks with the model's own attention. Raises `SpecError` for a prompt that is empty or too long.

    The first `shared` tokens are those of the prompt `known`, which has been read: they are not read again.
    """
    from transformers import DynamicCache

    limit = network.spec.max_positions
    if not 1 <= len(tokens) <= limit:
        raise SpecError(f"prompt of {len(tokens)} tokens: {network.spec.name} takes 1 to {limit}")
    if not 0 <= shared < len(tokens) or shared > (known.num_tokens if known else 0):
        raise SpecError(f"prompt of {len(tokens)} tokens: {shared} of them cannot be shared with what has been read")
    cache, logits = DynamicCache(), torch.empty(0)
    with torch.inference_mode():
        for layer, (keys, values) in enumerate(known.kv if known and shared else ()):
            cache.update(keys[None, :, :shared], values[None, :, :shared], layer)
        for start in range(shared, len(tokens), chunk_tokens):
            chunk = tokens[None, start : start + chunk_tokens].to(network.device)
            logits = network.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return Prompt(tuple((layer.keys[0], layer.values[0]) for layer in cache.layers), logits[0, -1])
