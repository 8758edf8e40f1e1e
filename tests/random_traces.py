"""Small random attention traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from clo.trace import NO_PAGE, AttentionTrace, TraceHeader

STEPS, LAYERS, KV_HEADS, HEADS, DIM, BUDGET = 7, 4, 2, 6, 16, 12


def make_header(**changes: Any) -> TraceHeader:
    fields: dict[str, Any] = {
        "model": "random",
        "num_layers": LAYERS,
        "num_query_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "page_size": 4,
        "context_tokens": 60,
        "num_steps": STEPS,
        "max_budget_pages": BUDGET,
        "num_sink_tokens": 4,
        "recent_window_tokens": 16,
        "lookaheads": (1, 3),
        "selectors": ("exact", "page_minmax"),
        "group_fold": "mean",
        "text_source": "none",
        "text_sha256": "0",
        "nll_per_token": 1.0,
        "recorded_at": "2026-01-01",
        "versions": {},
    }
    return TraceHeader.parse(fields | changes)


def random_pages(header: TraceHeader, rng: np.random.Generator) -> np.ndarray:
    pages = np.full(header.page_shape, NO_PAGE, np.uint16)
    for step in range(header.num_steps):
        for layer in range(header.num_layers):
            for head in range(header.num_kv_heads):
                chosen = rng.permutation(header.num_candidate_pages(step))[: header.max_budget_pages] + 1
                pages[step, layer, head, : len(chosen)] = chosen
    return pages


def random_arrays(header: TraceHeader, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=header.query_shape).astype(np.float32) * rng.uniform(0.2, 5)
    ahead = {d: queries + 0.3 * d * rng.normal(size=header.query_shape) for d in header.lookaheads}
    lookahead_pages = {(s, d): random_pages(header, rng) for s in header.selectors for d in header.lookaheads}
    for distance in header.lookaheads:
        ahead[distance][:, :distance] = 0
        for selector in header.selectors:
            lookahead_pages[selector, distance][:, :distance] = NO_PAGE
    return {
        "queries": queries,
        "lookahead_queries": ahead,
        "pages": {s: random_pages(header, rng) for s in header.selectors},
        "lookahead_pages": lookahead_pages,
        "page_mass": -np.sort(-rng.uniform(0, 0.1, header.page_shape), axis=-1),
        "resident_mass": rng.uniform(0, 1, header.page_shape[:3]),
        "head_importance": np.ones((header.num_layers, header.num_query_heads)),
    }


def assert_same(first: AttentionTrace, second: AttentionTrace) -> None:
    assert first.header == second.header
    np.testing.assert_array_equal(first.queries, second.queries)
    np.testing.assert_array_equal(first.page_mass, second.page_mass)
    np.testing.assert_array_equal(first.resident_mass, second.resident_mass)
    np.testing.assert_array_equal(first.head_importance, second.head_importance)
    for name in ("lookahead_queries", "pages", "lookahead_pages"):
        one, other = getattr(first, name), getattr(second, name)
        assert list(one) == list(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
