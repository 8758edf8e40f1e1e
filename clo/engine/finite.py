"""Where numbers that are none came from, once logits show that there are some. Looks; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from clo.engine.layers import Layer, LinearLayer, OffloadedLayer, StreamedLayer, WindowedLayer
from clo.engine.layers.linear import Pair

KINDS = ("key", "value")


class Projected(NamedTuple):
    """What a layer made of the newest token: rotated query `[batch, query_heads, head_dim]`, rotated key and value
    `[batch, kv_heads, head_dim]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class States(NamedTuple):
    """What the newest token left in a layer with linear attention: queries, keys and values as projected `[batch,
    width]`, states `[batch, value_heads, key_dim, value_dim]`."""

    projected: torch.Tensor
    states: torch.Tensor

    @classmethod
    def left(cls, kept: Pair) -> States:
        """In what is kept after it."""
        conv, states = kept
        return cls(projected=conv[..., -1], states=states)


def explain_step(
    layers: Mapping[int, Layer],
    projected: Mapping[int, Projected | States],
    lengths: Sequence[int],
    *,
    gated: bool = False,
) -> str:
    """The first layer of a step whose query, key, value or state was not finite. `lengths`: tokens of each sequence.

    What layers that are not in `layers` keep is not looked at: those with a sliding window. `gated`: whether a gate,
    which is not looked at either, scales what attention gives.
    """

    def unseen(layer: int) -> str:
        if isinstance(projected[layer], States) or (gated and layer in layers):
            return "gate, or "
        return "" if layer in layers else "window, or its "

    for layer, part in sorted(projected.items()):
        said = _linear_problem(part) if isinstance(part, States) else _softmax_problem(part)
        if said:
            return f"first in layer {layer}: its {said}"
        if said is None:
            # its input was not: the layer before has attended such numbers, or made them afterwards
            before = layers.get(layer - 1)
            found = _first(before, layer - 1, lengths) if before else ""
            what = "projections, and so its" if isinstance(part, States) else "query, key and value, and so its"
            return found or _entered(layer, unseen(layer - 1) if layer else "", what)
    last = max(projected)
    return (_first(layers[last], last, lengths) if last in layers else "") or _left(last, unseen(last))


def _softmax_problem(part: Projected) -> str | None:
    """What of it is not finite; empty if all is, none if nothing is."""
    bad = [name for name, each in part._asdict().items() if not bool(torch.isfinite(each).all())]
    if len(bad) == len(Projected._fields):
        return None
    return f"{' and '.join(bad)} of the newest token" if bad else ""


def _linear_problem(part: States) -> str | None:
    """The same of linear attention. Of an input that is not finite every projection of a sequence is none."""
    finite = torch.isfinite(part.projected)
    if not bool(finite.any(-1).all()):
        return None
    if not bool(finite.all()):
        return "projections of the newest token"
    return "" if bool(torch.isfinite(part.states).all()) else "states"


def explain_prompt(layers: Sequence[Layer], lengths: Sequence[int]) -> str:
    """The same of prompts that have just been read, by what is kept of them: their keys and values."""
    for index, layer in enumerate(layers):
        if isinstance(layer, LinearLayer):
            said = _linear_problem(States.left(layer.kept))
            if said is None:
                return _entered(index, "query, or ", "projections, and so its")
            if said:
                return f"first in layer {index}: its {said}"
            continue
        kinds = {kind for kind, _ in _not_finite(layer, lengths)}
        if kinds == set(KINDS):
            return _entered(index, "query, or ")
        if kinds:
            return _first(layer, index, lengths)
    return _left(len(layers) - 1, "query, or ")


def _first(layer: Layer, index: int, lengths: Sequence[int]) -> str:
    """Empty if the layer's keys and values are finite."""
    return next((f"first in layer {index}: a {kind} {where}" for kind, where in _not_finite(layer, lengths)), "")


def _entered(index: int, before: str, what: str = "query, key and value, and so its") -> str:
    where = f"layer {index - 1}'s {before}weights behind its attention, or" if index else "the embedding or"
    return f"first in layer {index}: its {what} input: look at {where} at its input norm"


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
    """What a sequence has, `[heads, rows_per_token, rows, ...]`, of which heads, and what a row is called."""
    heads = range(layer.shape.num_kv_heads)
    if isinstance(layer, LinearLayer):
        return
    if not isinstance(layer, OffloadedLayer):
        store = layer.host if isinstance(layer, StreamedLayer) else layer.kv
        yield "window row" if isinstance(layer, WindowedLayer) else "token", heads, store[sequence, :, :, :length]
        return
    if layer.design.offloads:
        yield "host page", heads, layer.format.restored(layer.host_pages[sequence]).permute(1, 2, 0, 3, 4)
    yield "window row", heads, layer.kv.window[sequence]
    yield "token", heads, layer.kv.sinks[sequence]
    yield "slot", heads, layer.format.restored(layer.kv.slots[sequence]).transpose(1, 2)
    yield "token", layer.heads.pinned, layer.kv.pinned[sequence]
