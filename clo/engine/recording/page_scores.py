"""Attention mass and page scores of one layer, as the recorded selectors define them. Knows nothing about models."""

from __future__ import annotations

from typing import Any


class PageIndex:
    """Elementwise minimum and maximum of the rotated keys of each full page of one layer, as pages fill."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._low: Any = None
        self._high: Any = None

    def extend(self, keys: Any) -> None:
        """Take in the pages that have filled up; `keys` is [num_kv_heads, tokens, head_dim]."""
        import torch

        known = 0 if self._low is None else self._low.shape[1]
        full = keys.shape[1] // self._page_size
        if full == known:
            return
        fresh = keys[:, known * self._page_size : full * self._page_size]
        fresh = fresh.unflatten(1, (full - known, self._page_size))
        low, high = fresh.amin(2), fresh.amax(2)
        self._low = low if known == 0 else torch.cat([self._low, low], 1)
        self._high = high if known == 0 else torch.cat([self._high, high], 1)

    def scores(self, query: Any, scaling: float, candidates: int) -> Any:
        """Scores [num_kv_heads, candidates] of pages 1..candidates for `query` [num_query_heads, head_dim]."""
        low, high = self._low[:, None, 1 : candidates + 1], self._high[:, None, 1 : candidates + 1]
        folded = query.reshape(low.shape[0], -1, 1, query.shape[-1])
        bound = (folded.clamp(min=0) * high + folded.clamp(max=0) * low).sum(-1) * scaling
        return bound.softmax(-1).mean(1)


def attention_mass(query: Any, keys: Any, scaling: float) -> Any:
    """Softmax over all tokens: [num_kv_heads, group_size, tokens].

    `query` is [num_query_heads, head_dim], `keys` [num_kv_heads, tokens, head_dim].
    """
    grouped = query.reshape(keys.shape[0], -1, query.shape[-1])
    return (grouped @ keys.transpose(1, 2) * scaling).softmax(-1)


def page_sums(mass: Any, page_size: int, candidates: int) -> Any:
    """Sums [num_kv_heads, candidates] of `mass` [num_kv_heads, tokens] over pages 1..candidates."""
    tokens = mass[:, page_size : (candidates + 1) * page_size]
    return tokens.unflatten(1, (candidates, page_size)).sum(-1)
