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
    `value_dim`: of vectors that are key and value in one (latent attention) the first so many values are the value.
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
    value_dim: int | None = None

    @property
    def rows_per_token(self) -> int:
        """Key and value, or one vector that is both."""
        return 2 if self.value_dim is None else 1

    def rows_of(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`rows_per_token` times `[..., kv_heads, tokens, head_dim]`, of what the library keeps of tokens.

        That is rotated keys and values; of latent attention the values' share of the vectors, and their rest.
        """
        return (first, second) if self.value_dim is None else (torch.cat([first, second], -1),)

    def appended(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same of one token as a layer's `append` takes it: key and value, or one vector that is both."""
        rows = self.rows_of(first, second)
        return rows[0], rows[1] if len(rows) > 1 else None

    def parted(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two again: views of `rows` `[rows_per_token, ..., kv_heads, tokens, head_dim]`."""
        if self.value_dim is None:
            return rows[0], rows[1]
        return rows[0, ..., : self.value_dim], rows[0, ..., self.value_dim :]

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
