"""Buffers through which pages are staged: collected by CPU threads, then sent and scattered to their slots.

On CUDA all are as large as they may have to be and are kept: an allocation may wait for a kernel that polls a flag,
which waits for the pages. On a CPU they are made as they are needed. Knows nothing about which pages.
"""

from __future__ import annotations

import torch

from clo.engine.layers import OffloadedLayer
from clo.engine.words import two_memories


class Staging:
    """One buffer on the host for each user (a stage of a layer), one on the device for all: its copies are in order."""

    def __init__(self) -> None:
        self._pinned: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        self._device: tuple[torch.Tensor, torch.Tensor] | None = None
        self._taken: dict[object, torch.Tensor] = {}

    def take(self, user: object, layer: OffloadedLayer, count: int) -> torch.Tensor:
        """Room for `count` pages on the host, `[count, page values]`, until they are sent."""
        rows = layer.host_rows
        if not two_memories(layer.shape.device):
            self._taken[user] = torch.empty((count, rows.shape[1]), dtype=rows.dtype)
            return self._taken[user]
        most = layer.selection.pages.numel()
        if user not in self._pinned:
            pages = torch.empty((most, rows.shape[1]), dtype=rows.dtype, pin_memory=True)
            self._pinned[user] = pages, torch.empty(most, dtype=torch.int64, pin_memory=True)
        if self._device is None:
            # now, though nothing may have to be sent: what is sent later may be what a kernel polls for
            self._device = (
                torch.empty((most, rows.shape[1]), dtype=rows.dtype, device=layer.shape.device),
                torch.empty(most, dtype=torch.int64, device=layer.shape.device),
            )
        self._taken[user] = self._pinned[user][0][:count]
        return self._taken[user]

    def send(self, user: object, layer: OffloadedLayer, target: torch.Tensor) -> None:
        """What `user` collected, to rows `target` of the slots, int64 `[count]`."""
        pages = self._taken.pop(user)
        if not len(target):
            return
        if user in self._pinned:
            pages, target = self._sent(user, pages, target)
        layer.slot_rows.index_copy_(0, target, pages)

    def _sent(self, user: object, pages: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._device is not None
        pinned_target = self._pinned[user][1][: len(target)]
        pinned_target.copy_(target)
        arrived, where = self._device[0][: len(pages)], self._device[1][: len(target)]
        arrived.copy_(pages, non_blocking=True)
        where.copy_(pinned_target, non_blocking=True)
        return arrived, where
