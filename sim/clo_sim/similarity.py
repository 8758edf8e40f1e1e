"""Cosines between the queries of a trace, folded per KV head, as the gate sees them. Knows nothing about pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clo.specs import GqaFold
from clo.trace import AttentionTrace

REAL, PREDICTED = 0, 1
"""Where a query comes from: the layer's own input, or the input of an earlier layer."""

Cosines = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Similarity:
    """`cosine[a][b][head, s, t]` between query `s` of origin `a` and query `t` of origin `b`, per KV head.

    Heads are all recorded KV heads, layer by layer: `head = layer * num_kv_heads + kv_head`.
    """

    cosine: tuple[tuple[Cosines, ...], ...]

    def between(self, origin: int, step: int, heads: NDArray[np.intp], anchor_origin: NDArray[np.int8],
                anchor_step: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cosine of each head's query at `step` with its anchor, `[len(heads)]`."""
        rows = self.cosine[origin]
        real = rows[REAL][heads, step, anchor_step[heads]]
        if len(rows) == 1:
            return real
        predicted = rows[PREDICTED][heads, step, anchor_step[heads]]
        return np.where(anchor_origin[heads] == REAL, real, predicted)


def similarity(trace: AttentionTrace, fold: GqaFold, lookahead: int) -> Similarity:
    """Fold the cosines of a trace; with `lookahead` > 0 those of the predicted queries too."""
    origins = [_unit(trace.queries)]
    if lookahead:
        origins.append(_unit(trace.lookahead_queries[lookahead]))
    weights = trace.head_importance.reshape(-1, trace.header.num_query_heads // trace.header.num_kv_heads)
    folded = tuple(tuple(_fold(a @ b.swapaxes(-1, -2), fold, weights) for b in origins) for a in origins)
    return Similarity(folded)


def _unit(queries: NDArray[np.floating]) -> NDArray[np.float32]:
    """`[steps, layers, query_heads, head_dim]` -> unit vectors `[layers * query_heads, steps, head_dim]`."""
    vectors = np.asarray(queries, dtype=np.float32).transpose(1, 2, 0, 3)
    vectors = vectors.reshape(-1, *vectors.shape[2:])
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def _fold(cosines: Cosines, fold: GqaFold, weights: NDArray[np.floating]) -> Cosines:
    """`[layers * query_heads, s, t]` -> `[layers * kv_heads, s, t]`."""
    grouped = cosines.reshape(*weights.shape, *cosines.shape[1:])
    if fold is GqaFold.MIN:
        return np.asarray(grouped.min(axis=1), dtype=np.float32)
    if fold is GqaFold.MEAN:
        return np.asarray(grouped.mean(axis=1), dtype=np.float32)
    shares = weights / weights.sum(axis=1, keepdims=True)
    return np.asarray(np.einsum("hg,hgst->hst", shares, grouped), dtype=np.float32)
