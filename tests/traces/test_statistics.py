"""Statistics of traces."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_traces import (
    LAYERS,
    make_header,
    random_arrays,
)

from clo.trace import NO_PAGE, AttentionTrace
from clo.trace_stats import anchored_hits, describe, group_cosine, overlap


class TestStatistics:
    def test_group_cosine(self) -> None:
        first = np.array([[[1.0, 0.0], [0.0, 2.0]]])
        second = np.array([[[3.0, 0.0], [1.0, 0.0]]])
        np.testing.assert_allclose(group_cosine(first, second, 1), [[0.5]])
        np.testing.assert_allclose(group_cosine(first, second, 2), [[1.0, 0.0]])
        assert not group_cosine(first, np.zeros_like(second), 1).any()

    def test_anchor_moves_on_a_miss_only(self) -> None:
        angles = np.radians([0, 30, 50, 80, 100])
        queries = np.stack([np.cos(angles), np.sin(angles)], -1)[:, None, None]
        # tau of 40 degrees: 30 hits; 50 misses and becomes the anchor; 80 hits; 100 misses
        np.testing.assert_array_equal(anchored_hits(queries, 1, np.cos(np.radians(40)))[:, 0, 0], [1, 0, 1, 0])

    def test_overlap(self) -> None:
        first = np.array([5, 2, 9, NO_PAGE])
        assert overlap(first, np.array([2, 5, 1, 9]), 2, 10) == 1
        assert overlap(first, np.array([2, 5, 1, NO_PAGE]), 4, 10) == pytest.approx(2 / 3)
        assert overlap(np.array([NO_PAGE]), np.array([NO_PAGE]), 1, 10) == 0

    def test_describe_is_plain_data(self, trace: AttentionTrace) -> None:
        described = describe(trace)
        assert json.loads(json.dumps(described, allow_nan=False)) == described
        assert list(described["cosine_at_lag"]) == ["1", "4"]
        assert len(described["layers"]) == LAYERS
        assert described["adjacent_overlap"]["exact"].keys() == {"8"}

    def test_describe_one_step(self) -> None:
        header = make_header(num_steps=1, max_budget_pages=1, lookaheads=())
        described = describe(AttentionTrace.from_arrays(header, **random_arrays(header)))
        assert described["cosine_at_lag"] == {}
        assert described["layers"] == []

    def test_lists_of_all_pages_are_not_compared(self) -> None:
        header = make_header(max_budget_pages=16)
        described = describe(AttentionTrace.from_arrays(header, **random_arrays(header)))
        assert header.num_candidate_pages(0) < 16
        assert described["adjacent_overlap"]["exact"].keys() == {"8"}
