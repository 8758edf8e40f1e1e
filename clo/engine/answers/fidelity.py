"""How far a layer's attention is from full attention over the same cache: an oracle in float64.

The cache is the design's own, with all that its approximation did to earlier tokens. Knows nothing about decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from clo.engine.inline_decoder import Observed
from clo.engine.layers import OffloadedLayer
from clo_kernels.layout import NO_PAGE, window_start


@dataclass(slots=True)
class Fidelity:
    """Means over the query heads of the observed attentions: an `Observer` of an `InlineDecoder`.

    Observed is each layer in every `every`-th step, a different one in each step: all layers count the same.
    """

    every: int = 16
    _step: int = 0
    _last: int = -1
    _error: float = 0.0
    _mass: float = 0.0
    _heads: int = 0

    @property
    def output_error(self) -> float:
        """Norm of the difference to full attention's output over the norm of that; NaN if nothing was observed."""
        return self._error / self._heads if self._heads else math.nan

    @property
    def mass_recalled(self) -> float:
        """Share of full attention's weights that lies on the tokens attended; NaN if nothing was observed."""
        return self._mass / self._heads if self._heads else math.nan

    def __call__(self, observed: Observed) -> None:
        """Called after each attention, layers in order."""
        self._step += observed.number <= self._last
        self._last = observed.number
        if (self._step + observed.number) % self.every:
            return
        for sequence in range(len(observed.lengths)):
            error, mass = against_full(observed, sequence)
            self._error += float(error.sum())
            self._mass += float(mass.sum())
            self._heads += len(error)


def against_full(observed: Observed, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative output error and attention mass recalled `[query_heads]` of one sequence, against full attention over
    all its tokens. Of mass only what lies on tokens counts, not the sinks' own."""
    layer, length = observed.layer, int(observed.lengths[sequence])
    whole = whole_cache(layer, sequence, length).double()
    keys, values = whole[:, 0], whole[:, -1, :, : layer.shape.value_dim]
    query, out = (
        given[sequence].double().view(len(keys), -1, size)
        for given, size in ((observed.query, keys.shape[2]), (observed.attended, values.shape[2]))
    )
    logits = query @ keys.transpose(1, 2) * layer.shape.scale
    if observed.sink_logits is not None:
        logits = torch.cat([logits, observed.sink_logits.double().view(len(keys), -1, 1)], -1)
    weights = logits.softmax(-1)[..., :length]
    full = weights @ values
    error = (out - full).norm(dim=-1) / full.norm(dim=-1)
    mass = (weights * attended_tokens(layer, sequence, length)[:, None]).sum(-1) / weights.sum(-1)
    return error.flatten(), mass.flatten()


def whole_cache(layer: OffloadedLayer, sequence: int, length: int) -> torch.Tensor:
    """Keys and values of every token `[kv_heads, rows_per_token, length, head_dim]`, as attention has them.

    What the sinks and the window hold is taken from there, pages as kept.
    """
    start = window_start(length, layer.attended_kv.recent_tokens, layer.page_size)
    pages = layer.format.restored(layer.host_pages[sequence, : start // layer.page_size].to(layer.shape.device))
    ring = torch.arange(start, length, device=layer.shape.device) % layer.kv.ring_tokens
    window = layer.kv.window[sequence][:, :, ring]
    whole = torch.cat([pages.permute(1, 2, 0, 3, 4).flatten(2, 3), window], 2)
    if start:
        whole[:, :, : layer.page_size] = layer.kv.sinks[sequence]
    for row, head in enumerate(layer.heads.pinned):
        whole[head] = layer.kv.pinned[sequence, row, :, :length]
    return whole


def attended_tokens(layer: OffloadedLayer, sequence: int, length: int) -> torch.Tensor:
    """Whether a KV head attends to a token, bool `[kv_heads, length]`."""
    start = window_start(length, layer.attended_kv.recent_tokens, layer.page_size)
    token = torch.arange(length, device=layer.shape.device)
    always = (token < layer.page_size) | (token >= start)
    mask = always.repeat(layer.shape.num_kv_heads, 1)
    for head, selected in enumerate(layer.selection.pages[sequence]):
        pages = selected[selected != NO_PAGE]
        mask[head] |= torch.isin(token // layer.page_size, pages)
    mask[list(layer.heads.pinned)] = True
    return mask
