"""Whether a model taken apart (`Network`) computes what the model does. Knows nothing about designs and caches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch

from clo.engine.models.network import Asked, Network, Rotation
from clo.errors import SpecError

TOKENS = 8
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that the tests decode: these are taken at their word."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of what a layer adds to the hidden state; both ways run the same modules, only attention may round differently."""
ROUNDINGS = 4
"""What the sum may have lost, in units of its last place."""

_checked: WeakSet[Network] = WeakSet()


def check_taken_apart(network: Network) -> None:
    """Raise `SpecError` for a model whose layers do more than a Llama's: it would decode, and wrongly.

    Has a model of another type read a few tokens both ways, at the last of its positions: some scale queries there.
    Each layer is given what the model gives it: else rounding could send a token to other experts early on.
    """
    if network.model.config.model_type in KNOWN or network in _checked:
        return
    # as few as every window shows
    count = min(TOKENS, network.spec.max_positions, network.spec.window_tokens or TOKENS)
    positions = torch.arange(network.spec.max_positions - count, network.spec.max_positions, device=network.device)
    tokens = torch.arange(count, device=network.device) % network.spec.vocab_size
    with torch.inference_mode():
        states, logits = _states_and_logits(network, tokens, positions)
        rotations = network.rotations(states[0], positions)
        same = _is_same(network, network.embed(tokens), states[0], states[0])
        for layer, (given, wanted) in enumerate(pairwise(states)):
            contribution = _contribution(network, layer, given, rotations[layer])
            same &= _is_same(network, network.after_attention(layer, given, contribution), wanted, wanted - given)
        same &= _is_same(network, network.lm_head(network.final_norm(states[-1])), logits, logits)
    if not same:
        raise SpecError(
            f"model {type(network.model).__name__}: taken apart it computes something else: its layers do more than "
            "those of the models that are known here: use clo.engine.offload, which leaves it whole"
        )
    _checked.add(network)


def _states_and_logits(
    network: Network, tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the model gives to each layer and to its last norm, `[tokens, 1, hidden_size]` as a batch's, and its logits
    `[tokens, vocab_size]`."""
    states: list[torch.Tensor] = []

    def see(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).transpose(0, 1))

    modules = [*network.layers, network.decoder.norm]
    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        read: Any = network.model(tokens[None], position_ids=positions[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states, read.logits[0]


def _is_same(network: Network, found: torch.Tensor, wanted: torch.Tensor, added: torch.Tensor) -> bool:
    """Of most tokens; rounding may send one to other experts. What is not finite is reported where a prompt is read."""
    error, allowed, whole = (each.float().flatten(1).norm(dim=1) for each in (found - wanted, added, wanted))
    rounding = ROUNDINGS * torch.finfo(network.dtype).eps * whole
    wrong = error > TOLERANCE.get(network.dtype, 1e-3) * allowed + rounding
    return bool(wrong.float().mean() < 0.5)


def _contribution(network: Network, layer: int, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    normed = network.input_norm(layer, hidden)
    if network.spec.linear_in(layer) is not None:
        return network.linear_attention(layer, normed.transpose(0, 1), None).transpose(0, 1)
    asked = network.qkv(layer, normed)
    query, key = network.rotate(asked.query, asked.key, rotation)
    of_one = asked._replace(query=_as_one(query), key=_as_one(key), value=_as_one(asked.value))
    attended = _attended(of_one, network.scale, network.sink_logits(layer)).transpose(0, 1)
    return network.out_proj(layer, network.output_gate(attended, asked.gate))


def _as_one(heads: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, 1, head_dim]` as those of one sequence, `[heads, tokens, head_dim]`."""
    return heads[:, :, 0].transpose(0, 1)


def _attended(asked: Asked, scale: float, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Causal attention of one sequence, `[query_heads, tokens, head_dim]`, written out: torch's own has no sinks."""
    query, key, value, _ = asked
    group, count = query.shape[0] // key.shape[0], query.shape[1]
    key, value = (tensor.float().repeat_interleave(group, 0) for tensor in (key, value))
    later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
    logits = (query.float() @ key.transpose(1, 2) * scale).masked_fill(later, float("-inf"))
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits.float()[:, None, None].expand(-1, count, 1)], -1)
    return (logits.softmax(-1)[..., :count] @ value).to(query.dtype)
