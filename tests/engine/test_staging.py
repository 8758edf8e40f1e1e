"""What pages pass through on their way to a device with a memory of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clo.engine import staging


def test_all_buffers_are_there_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step may be the first to send a page, while a kernel polls for it: an allocation may then wait."""
    made, empty = [], torch.empty

    def counted(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made.append(args)
        return empty(*args, **options)

    monkeypatch.setattr(staging, "two_memories", lambda device: True)
    monkeypatch.setattr(torch, "empty", counted)
    slots = torch.zeros(5, 8)
    layer: Any = SimpleNamespace(
        host_rows=torch.zeros(9, 8),
        slot_rows=slots,
        selection=SimpleNamespace(pages=torch.zeros(1, 2, 3)),
        shape=SimpleNamespace(device=torch.device("cpu")),
    )
    buffers = staging.Staging()
    buffers.take("layer", layer, 0)
    buffers.send("layer", layer, torch.empty(0, dtype=torch.int64))
    made.clear()
    buffers.take("layer", layer, 2).fill_(7)
    buffers.send("layer", layer, torch.tensor([4, 1]))
    assert not made
    assert slots[:, 0].tolist() == [0, 7, 0, 0, 7]
