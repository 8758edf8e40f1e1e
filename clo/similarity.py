"""Cosines between queries and anchors, folded per KV head, as the gate sees them. Knows nothing about pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clo.specs import GqaFold
from clo.trace import AttentionTrace

Vectors = NDArray[np.float32]
Cosines = NDArray[np.float32]


def unit_queries(queries: NDArray[np.floating]) -> Vectors:
    """`[steps, layers, query_heads, head_dim]` -> unit vectors `[layers * query_heads, steps, head_dim]`."""
    vectors = np.asarray(queries, dtype=np.float32).transpose(1, 2, 0, 3)
    vectors = vectors.reshape(-1, *vectors.shape[2:])
    norms = np.sqrt(np.einsum("hsd,hsd->hs", vectors, vectors))[..., None]
    return np.asarray(vectors / np.maximum(norms, np.finfo(np.float32).tiny))


def stepwise(queries: NDArray[np.floating], num_kv_heads: int) -> Vectors:
    """Unit queries step by step and grouped: `[steps, layers * kv_heads, group_size, head_dim]`."""
    unit = unit_queries(queries).swapaxes(0, 1)
    steps, layers, query_heads, head_dim = queries.shape
    grouped = unit.reshape(steps, layers * num_kv_heads, query_heads // num_kv_heads, head_dim)
    return np.ascontiguousarray(grouped)


class Fold:
    """Cosines of a group's query heads -> one number per KV head."""

    def __init__(self, trace: AttentionTrace, fold: GqaFold) -> None:
        header = trace.header
        weights = np.asarray(trace.head_importance).reshape(-1, header.num_query_heads // header.num_kv_heads)
        self._kind = fold
        self._shares = weights / weights.sum(axis=1, keepdims=True)

    def cosine(self, queries: Vectors, anchors: Vectors, heads: NDArray[np.intp] | slice = slice(None)) -> Cosines:
        """Cosine of unit vectors `[heads, group_size, head_dim]` with unit anchors, folded to `[heads]`."""
        per_query_head = np.einsum("hgd,hgd->hg", queries, anchors)
        if self._kind is GqaFold.MIN:
            return np.asarray(per_query_head.min(axis=1))
        if self._kind is GqaFold.MEAN:
            return np.asarray(per_query_head.mean(axis=1))
        return np.asarray((per_query_head * self._shares[heads]).sum(axis=1), dtype=np.float32)
