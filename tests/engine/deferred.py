"""A decoder's own operations on real tensors, each done when its turn on the fake device comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fake_device import FakeDevice

from clo.engine.cuda.machine import CudaMachine
from clo.engine.operations import Operations
from clo.schedule import Op, Step


class Deferred:
    """A decoder's operations, each done when its turn on the device comes."""

    def __init__(self, operations: Operations, device: FakeDevice) -> None:
        self._operations, self._device = operations, device
        self.moved_bytes, self.letter, self.key = operations.moved_bytes, operations.letter, operations.key

    def run(self, op: Op) -> None:
        if self._device.current is None:
            self._operations.run(op)
        else:
            self._device.submit(lambda: self._operations.run(op))


class DeferredMachine(CudaMachine):
    """The CUDA machine over a decoder's operations."""

    def __init__(self, operations: Operations, device: FakeDevice, **options: Any) -> None:
        super().__init__(Deferred(operations, device), device, **options)

    def execute(self, step: Step, title: str = "", *, prepare: Callable[[], None] = lambda: None) -> None:
        device = self._device
        assert isinstance(device, FakeDevice)

        def embed() -> None:
            with torch.inference_mode():
                prepare()

        super().execute(step, title, prepare=lambda: device.submit(embed))
