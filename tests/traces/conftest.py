"""A small random trace, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_traces import (
    make_header,
    random_arrays,
)

from clo.trace import AttentionTrace, TraceHeader


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
