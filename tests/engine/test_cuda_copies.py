"""Copies submitted by the driver's own call, against a stand-in of it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clo.engine.cuda.copies import declared, submit_rows, use
from clo.errors import EngineError

STREAM = 0x5EED


@pytest.fixture(scope="session")
def driver(cuda_stand_in: Path) -> ctypes.CDLL:
    return declared(ctypes.CDLL(str(cuda_stand_in)))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_rows_arrive_where_they_belong(driver: ctypes.CDLL, data: st.DataObject) -> None:
    width, dtype = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([torch.int8, torch.int16, torch.float32]))
    host = torch.randint(-100, 100, (30, width)).to(dtype)
    slots = torch.full((11, width), 123, dtype=dtype)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, 10), unique=True)), dtype=torch.int64)
    sources = torch.randint(0, 30, (len(targets),))
    expected = slots.clone()
    expected[targets] = host[sources]
    submit_rows(driver, STREAM, slots, targets, host, sources)
    assert torch.equal(slots, expected)


def test_the_drivers_code_is_told(driver: ctypes.CDLL) -> None:
    rows, first = torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(EngineError, match="cuMemcpyHtoDAsync failed with code 400"):
        submit_rows(driver, 0, rows, first, rows, first)


def test_a_thread_asks_its_stream_before_it_calls_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that makes a context for it, where the device is the current one of every thread."""
    asked, device = list[str](), torch.device("cuda", 0)

    class Stream:
        cuda_stream = STREAM

        def query(self) -> bool:
            asked.append("query")
            return False

    monkeypatch.setattr(torch.cuda, "set_device", lambda where: asked.append(f"set {where}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: asked.append(f"stream of {where}") or Stream())
    assert use(device) == STREAM
    assert asked == ["set cuda:0", "stream of cuda:0", "query"]
