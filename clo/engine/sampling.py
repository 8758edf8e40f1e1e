"""From logits to the next tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

Sampler = Callable[[torch.Tensor], torch.Tensor]
"""Logits `[batch, vocab_size]` to tokens `[batch]`."""


def sampler_of(temperature: float, seed: int) -> Sampler:
    """Draws from the logits' distribution at a temperature; the most likely token at 0."""
    if temperature == 0:
        return greedy
    source = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=source)[:, 0]


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The most likely token of each sequence."""
    return logits.argmax(-1)
