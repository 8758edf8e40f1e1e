"""How high a threshold of head reuse each KV head gets. Knows nothing about where importance comes from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
