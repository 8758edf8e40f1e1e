"""Whether a model taken apart (`Network`) computes what the model does. Knows nothing about designs and caches."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from weakref import WeakSet

import torch

from clo.engine.models.network import Network, Rotation, advice
from clo.errors import SpecError

TOKENS = 8
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that the tests decode: these are taken at their word."""
TOLERANCE = 1e-3
"""Of what a layer adds to the hidden state, in single precision: both ways run the same modules."""
ROUNDINGS = 2
"""Of embeddings and logits, in the model's own precision, in units of its last place."""

_checked: WeakSet[Network] = WeakSet()


class _Given(NamedTuple):
    """What the model gives a layer, or its last norm: hidden states `[1, tokens, hidden_size]`, and all the rest."""

    hidden: torch.Tensor
    rest: dict[str, Any]


def check_taken_apart(network: Network) -> None:
    """Raise `SpecError` for a model whose layers do more than a Llama's: it would decode, and wrongly.

    Has a model of another type read a few tokens at positions all over, then each of its layers what the model gave it,
    in single precision, both ways. What stands for experts computes something simpler of the same choice: they are
    large, and the same modules run them both ways.
    """
    if network.model.config.model_type in KNOWN or network in _checked:
        return
    try:
        same = _is_same(network)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise SpecError(f"{_refusal(network)} ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    if not same:
        raise SpecError(_refusal(network))
    _checked.add(network)


def _refusal(network: Network) -> str:
    return (
        f"model {type(network.model).__name__}: taken apart it computes something else: its layers do more than "
        f"those of the models that are known here{advice(network.spec)}"
    )


def _is_same(network: Network) -> bool:
    # as few as every window shows, and every indexer chooses
    spec = network.spec
    chosen = TOKENS if spec.indexer is None else spec.indexer.top_tokens
    count = min(TOKENS, spec.max_positions, spec.window_tokens or TOKENS, chosen)
    positions = torch.linspace(0, network.spec.max_positions - 1, count, device=network.device).long()
    tokens = torch.arange(count, device=network.device) % network.spec.vocab_size
    with torch.inference_mode():
        given, logits = _read(network, tokens, positions)
        entered, left = given[0].hidden.transpose(0, 1), given[-1].hidden.transpose(0, 1)
        same = _close(network, network.embed(tokens), entered)
        same &= _close(network, network.lm_head(network.final_norm(left)), logits)
        wide = [_in_single(rotation) for rotation in network.rotations(entered, positions)]
        return same and all(_layer_is_same(network, layer, each, wide[layer]) for layer, each in enumerate(given[:-1]))


def _read(network: Network, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[list[_Given], torch.Tensor]:
    """What each layer and the last norm are given, and the logits `[tokens, vocab_size]`."""
    given: list[_Given] = []

    def see(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        given.append(_Given(hidden, rest))

    hooks = [
        module.register_forward_pre_hook(see, with_kwargs=True) for module in (*network.layers, network.decoder.norm)
    ]
    try:
        # a mask that shows everything: else positions with gaps are taken for several texts
        read: Any = network.model(
            tokens[None],
            attention_mask=torch.ones_like(tokens)[None],
            position_ids=positions[None],
            use_cache=False,
        )
    finally:
        for hook in hooks:
            hook.remove()
    return given, read.logits[0]


def _layer_is_same(network: Network, layer: int, given: _Given, rotation: Rotation) -> bool:
    block, hidden = _wide(network.layers[layer]), given.hidden.float()
    wanted = block(hidden, **{name: _in_single(value) for name, value in given.rest.items()})
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    apart, rows = network.with_layer(layer, block), hidden.transpose(0, 1)
    found = apart.after_attention(layer, rows, _contribution(apart, layer, rows, rotation)).transpose(0, 1)
    error, added = (found - wanted).norm(dim=-1), (wanted - hidden).norm(dim=-1)
    wrong = error > TOLERANCE * added + ROUNDINGS * torch.finfo(torch.float32).eps * wanted.norm(dim=-1)
    # one token may have been sent to other experts; what is not finite is reported where a prompt is read
    return int(wrong.sum()) <= int(network.spec.experts is not None)


def _wide(layer: Any) -> Any:
    """A copy in single precision, whose experts are stood in for."""
    experts = getattr(getattr(layer, "mlp", None), "experts", None)
    known = {} if experts is None else {id(experts): _Experts()}
    return copy.deepcopy(layer, known).float()


class _Experts(torch.nn.Module):  # type: ignore[misc]
    """What tells which experts were chosen, and with what weights."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of hidden states `[tokens, hidden_size]` as many times themselves."""
        return hidden * ((chosen + 1) * weights).sum(-1, keepdim=True)


def _in_single(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_in_single, value))
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _close(network: Network, found: torch.Tensor, wanted: torch.Tensor) -> bool:
    error = (found.float() - wanted.float()).norm()
    return not bool(error > ROUNDINGS * torch.finfo(network.dtype).eps * wanted.float().norm())


def _contribution(network: Network, layer: int, hidden: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    normed = network.input_norm(layer, hidden)
    if network.spec.linear_in(layer) is not None:
        return network.linear_attention(layer, normed.transpose(0, 1), None).transpose(0, 1)
    asked = network.qkv(layer, normed)
    query, key = network.rotate(asked.query, asked.key, rotation)
    latent = network.spec.latent
    value = key[..., : latent.kv_rank] if latent is not None else asked.value
    attended = _attended(_as_one(query), _as_one(key), _as_one(value), network.scale, network.sink_logits(layer))
    attended = network.values(layer, attended.transpose(0, 1))
    return network.out_proj(layer, network.output_gate(attended, asked.gate))


def _as_one(heads: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, 1, head_dim]` as those of one sequence, `[heads, tokens, head_dim]`."""
    return heads[:, :, 0].transpose(0, 1)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sink_logits: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention of one sequence, `[query_heads, tokens, value_dim]`, written out: torch's own has no sinks."""
    group, count = query.shape[0] // key.shape[0], query.shape[1]
    key, value = (tensor.float().repeat_interleave(group, 0) for tensor in (key, value))
    later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
    logits = (query.float() @ key.transpose(1, 2) * scale).masked_fill(later, float("-inf"))
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits.float()[:, None, None].expand(-1, count, 1)], -1)
    return (logits.softmax(-1)[..., :count] @ value).to(query.dtype)
