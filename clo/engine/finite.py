"""Where numbers that are none came from, once logits show that there are some. Looks; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from clo.engine.layers import Layer, OffloadedLayer, StreamedLayer

KINDS = ("key", "value")


class Projected(NamedTuple):
    """What a layer made of the newest token: rotated query `[batch, query_heads, head_dim]`, rotated key and value
    `[batch, kv_heads, head_dim]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def explain_step(layers: Mapping[int, Layer], projected: Mapping[int, Projected], lengths: Sequence[int]) -> str:
    """The first layer of a step whose query, key or value was not finite. `lengths`: tokens of each sequence.

    What layers that are not in `layers` keep is not looked at: those with a sliding window.
    """
    for layer in range(len(projected)):
        bad = [name for name, part in projected[layer]._asdict().items() if not bool(torch.isfinite(part).all())]
        if bad and len(bad) < len(Projected._fields):
            return f"first in layer {layer}: its {' and '.join(bad)} of the newest token"
        if bad:
            # with all three its input was: the layer before has attended such numbers, or made them afterwards
            before = layers.get(layer - 1)
            unseen = "window, or its " if layer and before is None else ""
            return (_first(before, layer - 1, lengths) if before else "") or _entered(layer, unseen)
    last = len(projected) - 1
    return (_first(layers[last], last, lengths) if last in layers else "") or _left(last, "")


def explain_prompt(layers: Sequence[Layer], lengths: Sequence[int]) -> str:
    """The same of prompts that have just been read, by what is kept of them: their keys and values."""
    for index, layer in enumerate(layers):
        kinds = {kind for kind, _ in _not_finite(layer, lengths)}
        if kinds == set(KINDS):
            return _entered(index, "query, or ")
        if kinds:
            return _first(layer, index, lengths)
    return _left(len(layers) - 1, "query, or ")


def _first(layer: Layer, index: int, lengths: Sequence[int]) -> str:
    """Empty if the layer's keys and values are finite."""
    return next((f"first in layer {index}: a {kind} {where}" for kind, where in _not_finite(layer, lengths)), "")


def _entered(index: int, before: str) -> str:
    where = f"layer {index - 1}'s {before}weights behind its attention, or" if index else "the embedding or"
    return f"first in layer {index}: its query, key and value, and so its input: look at {where} at its input norm"


def _left(index: int, before: str) -> str:
    return (
        f"every layer's key and value is finite: look at layer {index}'s {before}weights behind its attention, the "
        "final norm and the head"
    )


def _not_finite(layer: Layer, lengths: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Key or value, and where the layer keeps it."""
    for sequence, length in enumerate(lengths):
        for place, heads, kv in _places(layer, sequence, length):
            bad = (~torch.isfinite(kv)).flatten(3).any(-1)
            for head, part, row in bad.nonzero().tolist():
                yield KINDS[part], f"({place} {row} of KV head {heads[head]}, sequence {sequence})"


def _places(layer: Layer, sequence: int, length: int) -> Iterator[tuple[str, Sequence[int], torch.Tensor]]:
    """What a sequence has, `[heads, 2, rows, ...]`, of which heads, and what a row is called."""
    heads = range(layer.shape.num_kv_heads)
    if not isinstance(layer, OffloadedLayer):
        store = layer.host if isinstance(layer, StreamedLayer) else layer.kv
        yield "token", heads, store[sequence, :, :, :length]
        return
    if layer.design.offloads:
        yield "host page", heads, layer.format.restored(layer.host_pages[sequence]).permute(1, 2, 0, 3, 4)
    yield "window row", heads, layer.kv.window[sequence]
    yield "token", heads, layer.kv.sinks[sequence]
    yield "slot", heads, layer.format.restored(layer.kv.slots[sequence]).transpose(1, 2)
    yield "token", layer.heads.pinned, layer.kv.pinned[sequence]
