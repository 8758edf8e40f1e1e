"""What a layer's cache is made for: its sizes, and what the head profile decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clo.engine.kernels import Kernels, kernels_for
from clo.engine.words import two_memories

NEVER = float("-inf")
"""The threshold of a head that never selects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Sizes of one layer's cache. `max_tokens` counts a sequence's prompt and all that it will generate.

    `recorded`: a step is recorded once and replayed, so that its device work must be the same whatever the lengths.
    """

    batch: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_tokens: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    recorded: bool = False

    @property
    def apart(self) -> bool:
        """Whether the host's pages lie in another memory than the device's."""
        return two_memories(self.device)

    @property
    def kernels(self) -> Kernels:
        """What runs on the device."""
        return kernels_for(self.device)

    @property
    def rows(self) -> tuple[int, int]:
        """Sequences and KV heads."""
        return self.batch, self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """What the head profile decides for one layer. Shapes: [kv_heads], [query_heads].

    With a `refresh_rate` a clock decides instead of the gate: each head selects in that share of the steps.
    """

    tau: torch.Tensor
    importance: torch.Tensor | None = None
    pinned: tuple[int, ...] = ()
    refresh_rate: float | None = None
