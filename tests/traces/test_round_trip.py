"""Traces in files come back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_traces import assert_same, make_header, random_arrays

from clo.errors import TraceError
from clo.trace import AttentionTrace, TraceHeader

# every element is off by at most half a step of 0.12 of the root mean square: 0.06 ** 2 / 2
WORST_COSINE = 1 - 0.0018


class TestRoundTrip:
    def test_file_gives_the_same_arrays(self, trace: AttentionTrace, saved: Path) -> None:
        assert_same(AttentionTrace.load(saved), trace)

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"max_budget_pages": 2},
            # fewer candidates than the budget, and more of them at every step
            {"context_tokens": 29, "page_size": 1, "max_budget_pages": 40, "num_sink_tokens": 1},
            # page ids beyond one byte
            {"context_tokens": 1500},
            {"num_steps": 1},
            {"lookaheads": ()},
            {"selectors": ("page_minmax",)},
        ],
    )
    def test_coding_keeps_pages_exactly_and_queries_closely(self, changes: dict[str, Any]) -> None:
        header = make_header(**changes)
        arrays = random_arrays(header, seed=1)
        trace = AttentionTrace.from_arrays(header, **arrays)
        for selector in header.selectors:
            np.testing.assert_array_equal(trace.pages[selector], arrays["pages"][selector])
        for key, pages in arrays["lookahead_pages"].items():
            np.testing.assert_array_equal(trace.lookahead_pages[key], pages)
        assert cosine(trace.queries, arrays["queries"]).min() > WORST_COSINE
        for distance, queries in arrays["lookahead_queries"].items():
            got = trace.lookahead_queries[distance]
            assert cosine(got[:, distance:], queries[:, distance:]).min() > WORST_COSINE
            assert not got[:, :distance].any()

    def test_masses_are_close(self, trace: AttentionTrace, header: TraceHeader) -> None:
        arrays = random_arrays(header)
        np.testing.assert_allclose(trace.page_mass, arrays["page_mass"], rtol=0.045)
        np.testing.assert_allclose(trace.resident_mass, arrays["resident_mass"], rtol=1e-3)

    def test_mass_is_optional(self, header: TraceHeader, tmp_path: Path) -> None:
        trace = AttentionTrace.from_arrays(header, **{**random_arrays(header), "page_mass": None})
        trace.save(tmp_path / "trace.npz")
        assert AttentionTrace.load(tmp_path / "trace.npz").page_mass is None

    def test_outliers_and_zero_vectors_survive(self, header: TraceHeader) -> None:
        arrays = random_arrays(header)
        arrays["queries"][0, 0, 0] = 0
        arrays["queries"][1, 0, 0, 3] = 500
        trace = AttentionTrace.from_arrays(header, **arrays)
        assert not trace.queries[0, 0, 0].any()
        assert cosine(trace.queries[1, 0, 0], arrays["queries"][1, 0, 0]) > WORST_COSINE

    def test_arrays_are_read_only(self, trace: AttentionTrace) -> None:
        with pytest.raises(ValueError, match="read-only"):
            trace.queries[0] = 0
        with pytest.raises(ValueError, match="read-only"):
            trace.pages["exact"][0] = 0

    def test_failed_save_leaves_the_old_file(
        self, trace: AttentionTrace, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fill_disk(file: Any, **_members: Any) -> None:
            file.write(b"half a trace")
            raise OSError(28, "No space left on device")

        before = saved.read_bytes()
        monkeypatch.setattr(np, "savez_compressed", fill_disk)
        with pytest.raises(TraceError, match=r"trace\.npz: cannot be written: No space left"):
            trace.save(saved)
        assert saved.read_bytes() == before
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_save_into_what_is_no_folder(self, trace: AttentionTrace, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TraceError, match="cannot be written"):
            trace.save(tmp_path / "file" / "trace.npz")


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = (first.astype(np.float64) * second).sum(-1)
    return product / (np.linalg.norm(first.astype(np.float64), axis=-1) * np.linalg.norm(second, axis=-1))
