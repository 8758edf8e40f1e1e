"""Logits of a decoder that is told which tokens come."""

from __future__ import annotations

from typing import Any

import torch
from small import prompt

from clo.engine.decoder import Decoder
from clo.schedule import Lane, record_step
from clo.specs import Design

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXTS = (prompt(78, 1), prompt(53, 2))
"""A batch of two, of different lengths."""
STEPS = 8


def forced_logits(model: Any, chosen: Design, tokens: torch.Tensor, start: int, **options: Any) -> torch.Tensor:
    """Logits of decoding `tokens` one by one after a prompt of the first `start` of them."""
    with Decoder(model, chosen, max_new_tokens=len(tokens) - start, **options) as decoder:
        rows = [decoder.prefill([tokens[:start]])[0]]
        rows += [decoder.step(token[None])[0].clone() for token in tokens[start:]]
    return torch.stack(rows)


def forced(decoder: Any, prompts: list[Any], texts: tuple[torch.Tensor, ...] = TEXTS) -> torch.Tensor:
    """Logits `[steps, batch, vocabulary]` of a batch that is told the last tokens of its texts."""
    rows = [decoder.prefill(prompts)]
    rows += [decoder.step(torch.stack([text[at] for text in texts])).clone() for at in range(-STEPS, 0)]
    return torch.stack(rows)


def assert_timeline_is_the_schedules(decoder: Any) -> set[str]:
    """One step: every operation on its lane, in the schedule's order. Returns their names."""
    decoder.prefill([prompt(80)])
    decoder.step(torch.tensor([1]))
    nodes, spans = record_step(decoder.plan).nodes, decoder.timeline.spans
    for lane in Lane:
        recorded = [(node.op.name, node.op.layer) for node in nodes if node.lane is lane]
        assert [(span.name, span.layer) for span in spans if span.lane == lane.value] == recorded
    return {span.name for span in spans}
