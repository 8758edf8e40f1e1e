"""Logits of a decoder that is told which tokens come."""

from __future__ import annotations

from typing import Any

import torch

from clo.engine.decoder import Decoder
from clo.specs import Design

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def forced_logits(model: Any, chosen: Design, tokens: torch.Tensor, start: int, **options: Any) -> torch.Tensor:
    """Logits of decoding `tokens` one by one after a prompt of the first `start` of them."""
    with Decoder(model, chosen, max_new_tokens=len(tokens) - start, **options) as decoder:
        rows = [decoder.prefill([tokens[:start]])[0]]
        rows += [decoder.step(token[None])[0].clone() for token in tokens[start:]]
    return torch.stack(rows)
