"""Damaged trace files are refused, and say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_traces import HEADS, LAYERS, STEPS, assert_same

from clo.errors import TraceError
from clo.trace import AttentionTrace


def resave(path: Path, **changes: Any) -> None:
    """Write the file's members again with some replaced, or removed where the new value is None."""
    with np.load(path, allow_pickle=False) as archive:
        members = dict(archive) | changes
    np.savez(path, **{name: array for name, array in members.items() if array is not None})


def header_bytes(path: Path, **changes: Any) -> np.ndarray:
    with np.load(path) as archive:
        data = json.loads(archive["header"].tobytes()) | changes
    return np.frombuffer(json.dumps(data).encode(), np.uint8)


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
