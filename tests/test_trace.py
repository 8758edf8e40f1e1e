"""Round trips, damage and statistics of attention traces. Small random traces, and the committed one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clo.errors import TraceError
from clo.trace import DEFAULT_TRACE, NO_PAGE, AttentionTrace, TraceHeader, candidate_pages
from clo.trace_stats import anchored_hits, describe, group_cosine, overlap

STEPS, LAYERS, KV_HEADS, HEADS, DIM, BUDGET = 7, 4, 2, 6, 16, 12
# every element is off by at most half a step of 0.12 of the root mean square: 0.06 ** 2 / 2
WORST_COSINE = 1 - 0.0018


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


@pytest.fixture
def header() -> TraceHeader:
    return make_header()


@pytest.fixture
def trace(header: TraceHeader) -> AttentionTrace:
    return AttentionTrace.from_arrays(header, **random_arrays(header))


@pytest.fixture
def saved(trace: AttentionTrace, tmp_path: Path) -> Path:
    path = tmp_path / "trace.npz"
    trace.save(path)
    return path


def resave(path: Path, **changes: Any) -> None:
    """Write the file's members again with some replaced, or removed where the new value is None."""
    with np.load(path, allow_pickle=False) as archive:
        members = dict(archive) | changes
    np.savez(path, **{name: array for name, array in members.items() if array is not None})


def header_bytes(path: Path, **changes: Any) -> np.ndarray:
    with np.load(path) as archive:
        data = json.loads(archive["header"].tobytes()) | changes
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


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

    def test_save_into_no_folder(self, trace: AttentionTrace, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="cannot be written"):
            trace.save(tmp_path / "absent" / "trace.npz")


def survives(trace: AttentionTrace, path: Path, data: bytes, rng: np.random.Generator) -> bool:
    """Flip one bit: whether the file still loads, which it may only with every array intact."""
    damaged = bytearray(data)
    damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    try:
        loaded = AttentionTrace.load(path)
    except TraceError:
        return False
    # such as a flipped date in the archive's directory
    assert_same(loaded, trace)
    return True


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    product = (first.astype(np.float64) * second).sum(-1)
    return product / (np.linalg.norm(first.astype(np.float64), axis=-1) * np.linalg.norm(second, axis=-1))


class TestDamage:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match=r"absent\.npz: no such file"):
            AttentionTrace.load(tmp_path / "absent.npz")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="cannot be read"):
            AttentionTrace.load(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
    def test_truncated(self, saved: Path, share: float) -> None:
        data = saved.read_bytes()
        saved.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(TraceError, match=r"trace\.npz: .*truncated") as caught:
            AttentionTrace.load(saved)
        assert "\n" not in str(caught.value)

    def test_flipped_byte_is_found_or_harmless(self, trace: AttentionTrace, saved: Path) -> None:
        data = saved.read_bytes()
        rng = np.random.default_rng(0)
        found = sum(not survives(trace, saved, data, rng) for _ in range(200))
        assert found > 150

    @pytest.mark.parametrize("version", [2, 0, "1", None])
    def test_other_schema(self, saved: Path, version: Any) -> None:
        resave(saved, header=header_bytes(saved, schema_version=version))
        with pytest.raises(TraceError, match=r"trace\.npz: header\.schema_version = .* this version reads 1"):
            AttentionTrace.load(saved)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_steps": 8}, "disagrees with the header"),
            ({"num_kv_heads": 3}, "disagrees with the header"),
            ({"max_budget_pages": 5}, "disagrees with the header"),
            ({"context_tokens": 40}, "disagrees with the header|out of range"),
            ({"num_steps": -1}, "num_steps"),
            ({"num_kv_heads": 4}, "multiple"),
            ({"lookaheads": [1]}, "not part of a trace"),
            ({"selectors": ["exact", "other"]}, "missing"),
            ({"colour": "red"}, "unknown field"),
        ],
    )
    def test_header_that_disagrees(self, saved: Path, changes: dict[str, Any], message: str) -> None:
        resave(saved, header=header_bytes(saved, **changes))
        with pytest.raises(TraceError, match=message):
            AttentionTrace.load(saved)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("header", None, "no header"),
            ("header", np.frombuffer(b"{", np.uint8), "not JSON"),
            ("query", None, "query: missing"),
            ("query", np.zeros((2, 2), np.uint8), "query: shape"),
            ("query", np.zeros(9, np.float32), "query: type float32"),
            ("query", np.zeros(9, np.uint8), "query: "),
            ("query_scale", np.full((STEPS, LAYERS, HEADS), np.nan, np.float16), "query_scale: .*not finite"),
            ("query_scale", np.ones((STEPS, LAYERS, HEADS - 1), np.float16), "query_scale: shape"),
            ("head_importance", np.full((LAYERS, HEADS), np.inf, np.float32), "head_importance: .*not finite"),
            ("extra", np.zeros(1), "extra: not part of a trace"),
            ("resident_mass", np.array([{"a": 1}], dtype=object), "Object arrays|pickle"),
        ],
    )
    def test_members(self, saved: Path, name: str, value: Any, message: str) -> None:
        resave(saved, **{name: value})
        with pytest.raises(TraceError, match=message) as caught:
            AttentionTrace.load(saved)
        assert str(caught.value).startswith(str(saved))

    def test_page_ids_out_of_range_in_a_file(self, trace: AttentionTrace, saved: Path) -> None:
        from clo.trace_file import pack

        resave(saved, pages_exact=pack(np.full(trace.header.list_shape, 11, np.uint8)))
        with pytest.raises(TraceError, match="pages_exact: page ids out of range"):
            AttentionTrace.load(saved)


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


@pytest.fixture(scope="module")
def committed() -> AttentionTrace:
    return AttentionTrace.load(DEFAULT_TRACE)


class TestCommittedTrace:
    def test_size_and_header(self, committed: AttentionTrace) -> None:
        header = committed.header
        assert DEFAULT_TRACE.stat().st_size <= 8_000_000
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
        trace = AttentionTrace.load(DEFAULT_TRACE)
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
