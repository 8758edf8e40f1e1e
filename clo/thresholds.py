"""How high a threshold of head reuse each KV head gets. Knows nothing about where importance comes from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clo.similarity import Fold, Vectors

LOWEST, HIGHEST = -1.0, 2.0
"""Below the first no query drifts far enough to renew a set, from just above 1 every query does."""


def tau_by_importance(tau: float, power: float, head_importance: ArrayLike, num_kv_heads: int) -> NDArray[np.float64]:
    """Thresholds `[layers, kv_heads]` that grow with importance: `1 - (1 - tau) / importance ** power`.

    `head_importance`: `[layers, query_heads]`, 1 for the mean head; a KV head has the mean of its group's. So a head
    of four times the mean importance is renewed at half the drift with a power of a half, and with 0 all are equal.
    """
    weights = np.asarray(head_importance, dtype=np.float64)
    of_group = weights.reshape(len(weights), num_kv_heads, -1).mean(axis=-1)
    # a head that adds nothing may drift as far as it likes
    drift = (1.0 - tau) / np.maximum(of_group, 1e-12) ** power
    return np.asarray(np.clip(1.0 - drift, LOWEST, HIGHEST))


def anchored_hit_rate(queries: Vectors, fold: Fold, tau: NDArray[np.float32]) -> NDArray[np.float64]:
    """Hit rate per KV head when the anchor moves only on a miss. `queries` as from `stepwise`; `tau` is `[heads]`."""
    anchors = queries[0].copy()
    hits = np.zeros(queries.shape[1])
    for query in queries[1:]:
        hit = fold.cosine(query, anchors) >= tau
        hits += hit
        anchors[~hit] = query[~hit]
    return hits / (len(queries) - 1)


def tau_for_hit_rate(queries: Vectors, fold: Fold, target: float) -> NDArray[np.float32]:
    """The largest tau per KV head (to 1/4096) whose anchored hit rate reaches `target`, by bisection."""
    low = np.full(queries.shape[1], -1.0, dtype=np.float32)
    high = np.full(queries.shape[1], 1.0, dtype=np.float32)
    for _ in range(13):
        middle = np.asarray((low + high) / 2, dtype=np.float32)
        reached = anchored_hit_rate(queries, fold, middle) >= target
        low = np.where(reached, middle, low).astype(np.float32)
        high = np.where(reached, high, middle).astype(np.float32)
    return low
