"""The trace that ships with the package."""

from __future__ import annotations

import time

import numpy as np
import pytest

from clo import presets
from clo.trace import AttentionTrace
from clo.trace_stats import describe


@pytest.fixture(scope="module")
def committed() -> AttentionTrace:
    return presets.load_trace()


class TestCommittedTrace:
    def test_size_and_header(self, committed: AttentionTrace) -> None:
        header = committed.header
        file = presets.folder("traces") / f"{presets.DEFAULT_TRACE}.npz"
        assert file.stat().st_size <= 8_000_000
        assert header.model == "smollm2-135m"
        assert (header.num_layers, header.num_query_heads, header.num_kv_heads, header.head_dim) == (30, 9, 3, 64)
        assert header.context_tokens >= 4096
        assert header.num_steps >= 128
        assert header.selectors == ("exact", "page_minmax")
        assert header.lookaheads == (1, 2)
        # a model that reads its text: 49152 tokens at random would cost 10.8 nats
        assert header.nll_per_token < 3.2

    def test_loads_fast(self) -> None:
        start = time.process_time()
        trace = presets.load_trace()
        assert trace.queries.any()
        assert trace.pages["page_minmax"].any()
        assert time.process_time() - start < 1.0

    def test_statistics_are_those_of_attention(self, committed: AttentionTrace) -> None:
        described = describe(committed)
        cosines = list(described["cosine_at_lag"].values())
        assert 0.5 < cosines[-1] < cosines[0] < 0.95
        assert cosines == sorted(cosines, reverse=True)
        hits = list(described["hit_rate_at_tau"].values())
        assert hits == sorted(hits, reverse=True)
        # two heads that choose 32 of 251 pages at random would share 0.13
        assert described["adjacent_overlap"]["exact"]["32"] > 0.5
        near, far = (described["lookahead_overlap"]["exact"][ahead]["32"] for ahead in ("1", "2"))
        assert 0.6 < far < near < 1
        assert committed.head_importance.mean() == pytest.approx(1, abs=1e-3)

    def test_mass_adds_up(self, committed: AttentionTrace) -> None:
        assert committed.page_mass is not None
        total = committed.page_mass.sum(-1) + committed.resident_mass.astype(np.float32)
        assert total.max() < 1.05
        assert total.mean() > 0.9
        assert (np.diff(committed.page_mass, axis=-1) <= 0).all()
