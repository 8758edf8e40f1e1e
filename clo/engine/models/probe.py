"""Whether a model taken apart (`Network`) computes what the model does. Knows nothing about designs and caches."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch

from clo.engine.models.network import Network
from clo.errors import SpecError

TOKENS = 8
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that the tests decode: these are taken at their word."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the logits' length; both ways run the same modules, only attention may round differently."""

_checked: WeakSet[Network] = WeakSet()


def check_taken_apart(network: Network) -> None:
    """Raise `SpecError` for a model whose layers do more than a Llama's: it would decode, and wrongly.

    Has a model of another type read a few tokens both ways, at the last of its positions: some scale queries there.
    """
    if network.model.config.model_type in KNOWN or network in _checked:
        return
    count = min(TOKENS, network.spec.max_positions)
    positions = torch.arange(network.spec.max_positions - count, network.spec.max_positions, device=network.device)
    tokens = torch.arange(count, device=network.device) % network.spec.vocab_size
    with torch.inference_mode():
        read: Any = network.model(tokens[None], position_ids=positions[None], use_cache=False)
        wanted, found = read.logits[0].float(), _logits(network, tokens, positions).float()
    # what is not finite is reported where the prompt is read
    if (found - wanted).norm() > TOLERANCE.get(network.dtype, 1e-3) * wanted.norm():
        raise SpecError(
            f"model {type(network.model).__name__}: taken apart it computes something else: its layers do more than "
            "those of Llama, Mistral, Qwen2 and Qwen3: use clo.engine.offload, which leaves it whole"
        )
    _checked.add(network)


def _logits(network: Network, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocab_size]` of one sequence, whose tokens take the place of a batch."""
    hidden = network.embed(tokens)
    rotation = network.rotation(hidden, positions)
    for layer in range(len(network.layers)):
        query, key, value = network.qkv(layer, network.input_norm(layer, hidden))
        query, key = network.rotate(query, key, rotation)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(tensor[:, :, 0].transpose(0, 1)[None] for tensor in (query, key, value)),
            is_causal=True,
            scale=network.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        hidden = hidden + network.out_proj(layer, attended[0].transpose(0, 1))
        gate_up = network.gate_up_proj(layer, network.post_norm(layer, hidden))
        hidden = hidden + network.down_proj(layer, network.activation(layer, *gate_up))
    return network.lm_head(network.final_norm(hidden))
