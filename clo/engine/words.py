"""Small integers that both the device and the CPU need: page lists, misses, slots.

On CUDA they lie on the device and once more in pinned host memory, and somebody must carry them over; on a CPU both are
the same memory and there is nothing to carry. Knows nothing about what the integers mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

ALIGNED_WORDS = 4
"""Kernels read 16 bytes at a time."""


def two_memories(device: torch.device) -> bool:
    """Whether device and host each have their own."""
    return str(device.type) == "cuda"


def wait_for_device(device: torch.device) -> None:
    """Until the host may read what the current stream has sent it; on a CPU at once."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Words:
    """Named int32 tensors side by side. `device` and `host` have the same names and shapes."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        total = sum(_aligned(shape) for shape in shapes.values())
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        apart = two_memories(device)
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=True) if apart else self._device
        self.device, self.host = _views(self._device, shapes), _views(self._host, shapes)

    @property
    def message(self) -> torch.Tensor:
        """All of them on the device, flat."""
        return self._device

    @property
    def mailbox(self) -> torch.Tensor:
        """All of them on the host, flat."""
        return self._host

    def bring(self) -> None:
        """To the host, on the current stream."""
        if self._host is not self._device:
            self._host.copy_(self._device, non_blocking=True)

    def send(self) -> None:
        """To the device, on the current stream."""
        if self._host is not self._device:
            self._device.copy_(self._host, non_blocking=True)


def _aligned(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // ALIGNED_WORDS) * ALIGNED_WORDS


def _views(flat: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    found, start = {}, 0
    for name, shape in shapes.items():
        found[name] = flat[start : start + math.prod(shape)].view(shape)
        start += _aligned(shape)
    return found
