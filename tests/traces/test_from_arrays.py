"""Traces from arrays: what is refused, and which pages are candidates."""

from __future__ import annotations

import numpy as np
import pytest
from random_traces import (
    random_arrays,
)

from clo.errors import TraceError
from clo.trace import NO_PAGE, AttentionTrace, TraceHeader, candidate_pages


class TestFromArrays:
    @pytest.mark.parametrize("name", ["queries", "resident_mass", "head_importance", "page_mass"])
    def test_not_a_number(self, header: TraceHeader, name: str) -> None:
        arrays = random_arrays(header)
        arrays[name].flat[3] = np.nan
        with pytest.raises(TraceError, match=f"{name}: holds values that are not finite"):
            AttentionTrace.from_arrays(header, **arrays)

    @pytest.mark.parametrize("name", ["queries", "resident_mass", "head_importance", "page_mass"])
    def test_shape(self, header: TraceHeader, name: str) -> None:
        arrays = random_arrays(header)
        arrays[name] = arrays[name][..., :-1]
        with pytest.raises(TraceError, match=f"{name}: shape .* disagrees"):
            AttentionTrace.from_arrays(header, **arrays)

    @pytest.mark.parametrize(
        ("entry", "page", "message"),
        [
            (0, 0, "out of range"),
            (3, 11, "out of range"),
            (0, NO_PAGE, "out of range"),
            (11, 3, "more pages than"),
        ],
    )
    def test_page_ids(self, header: TraceHeader, entry: int, page: int, message: str) -> None:
        arrays = random_arrays(header)
        assert header.num_candidate_pages(0) == 10
        arrays["pages"]["exact"][0, 1, 1, entry] = page
        with pytest.raises(TraceError, match=message):
            AttentionTrace.from_arrays(header, **arrays)

    def test_repeated_page(self, header: TraceHeader) -> None:
        arrays = random_arrays(header)
        pages = arrays["lookahead_pages"]["page_minmax", 3]
        pages[2, 3, 0, 4] = pages[2, 3, 0, 0]
        with pytest.raises(TraceError, match=r"lookahead_pages\[page_minmax, 3\]: step 2 names a page twice"):
            AttentionTrace.from_arrays(header, **arrays)

    def test_unknown_keys(self, trace: AttentionTrace) -> None:
        with pytest.raises(TraceError, match="no selector sign_hash: it has exact, page_minmax"):
            trace.pages["sign_hash"]
        with pytest.raises(TraceError, match="no lookahead 2: it has 1, 3"):
            trace.lookahead_queries[2]
        assert 2 not in trace.lookahead_queries


class TestCandidates:
    @pytest.mark.parametrize(
        ("tokens", "expected"),
        # window of 64, pages of 16: page 1 ends at 32, so it is a candidate from 32 + 64 tokens on
        [(0, 0), (95, 0), (96, 1), (111, 1), (112, 2), (4096, 251)],
    )
    def test_count(self, tokens: int, expected: int) -> None:
        assert candidate_pages(tokens, 16, 64) == expected

    def test_last_candidate_ends_before_the_window(self) -> None:
        for tokens in range(100, 200):
            last = candidate_pages(tokens, 8, 20)
            assert (last + 1) * 8 <= tokens - 20 < (last + 2) * 8
