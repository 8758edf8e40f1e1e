"""The cache of a layer with a sliding window: what is in it, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from clo.engine.layers.dense import DenseLayer
from clo.engine.layers.shape import LayerShape


class WindowedLayer(DenseLayer):
    """A ring of as many tokens as attention reaches back, the new one included: attention knows no order of them."""

    def __init__(self, shape: LayerShape, window_tokens: int) -> None:
        super().__init__(replace(shape, max_tokens=min(window_tokens, shape.max_tokens)))

    def begin(self, lengths: Sequence[int]) -> None:
        super().begin([min(tokens, self.shape.max_tokens) for tokens in lengths])

    def load(self, sequence: int, keys: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Of a prompt's tokens from `first` on, `[kv_heads, tokens, head_dim]`, what the window reaches."""
        tokens, ring = keys.shape[1], self.shape.max_tokens
        kept = min(tokens, ring)
        places = torch.arange(first + tokens - kept, first + tokens, device=self.kv.device) % ring
        self.kv[sequence, :, 0, places] = keys[:, tokens - kept :]
        self.kv[sequence, :, 1, places] = values[:, tokens - kept :]

    def append(self, key: torch.Tensor, value: torch.Tensor | None, lengths: torch.Tensor) -> None:
        super().append(key, value, (lengths - 1) % self.shape.max_tokens + 1)

    def attend(
        self, query: torch.Tensor, lengths: torch.Tensor, sink_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().attend(query, lengths.clamp(max=self.shape.max_tokens), sink_logits)
