"""Runs a design for some steps and keeps, step by step, when each operation ran and how much each layer moved.

Knows nothing about models of cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clo.engine.decoder import Decoder
from clo.engine.layers import Layer, OffloadedLayer, StreamedLayer
from clo.engine.prompts import Prompt
from clo.engine.random_weights import random_text
from clo.errors import EngineError
from clo.plan import DecodePlan
from clo.progress import Progress, nobody
from clo.schedule.ops import Stage
from clo.timeline import Timeline
from clo.traffic import Traffic


@dataclass(frozen=True, slots=True, eq=False)
class MachineRun:
    """Measured decode steps: one timeline a step, and what moved in them."""

    plan: DecodePlan
    timelines: tuple[Timeline, ...]
    traffic: Traffic

    @property
    def step_s(self) -> np.ndarray:
        """Seconds of each step, from its first operation to the end of its last."""
        return np.array([timeline.seconds for timeline in self.timelines])

    @property
    def median_step(self) -> int:
        """The step to show: of an even number, the slower of the two in the middle."""
        return int(np.argsort(self.step_s)[len(self.timelines) // 2])


def run_steps(
    decoder: Decoder,
    prompts: Sequence[torch.Tensor | Prompt],
    *,
    steps: int,
    warmup_steps: int = 2,
    text: Iterator[torch.Tensor] | None = None,
    progress: Progress = nobody,
) -> MachineRun:
    """Decode a `text`, by default the same random one under every design; the first `warmup_steps` are not kept.

    Raises `EngineError` for no step to measure.
    """
    if steps < 1:
        raise EngineError(f"steps = {steps}: must be at least 1")
    decoder.prefill(prompts)
    text = text or random_text(decoder.network, len(prompts))
    return go_on(decoder, text, steps=steps, warmup_steps=warmup_steps, progress=progress)


def go_on(
    decoder: Decoder,
    text: Iterator[torch.Tensor],
    *,
    steps: int,
    warmup_steps: int = 2,
    progress: Progress = nobody,
) -> MachineRun:
    """Further steps of prompts that have been read: tokens `[batch]` of each come from `text`.

    `progress(done, total)` is called after every step.
    """
    timelines, rows = [], []
    for step in range(warmup_steps + steps):
        decoder.step(next(text))
        if step >= warmup_steps:
            assert decoder.timeline is not None
            timelines.append(decoder.timeline)
            rows.append([_moved(layer) for layer in decoder.layers])
        progress(step + 1, warmup_steps + steps)
    assert decoder.plan is not None
    return MachineRun(decoder.plan, tuple(timelines), _traffic(decoder.plan, decoder.layers, np.array(rows)))


def fastest(runs: Sequence[MachineRun]) -> MachineRun:
    """Of each step the fastest of several runs that decoded the same: what nothing else on the machine disturbed.

    Raises `EngineError` for runs that moved different pages.
    """
    first = runs[0]
    for run in runs[1:]:
        if not np.array_equal(run.traffic.fetched_pages, first.traffic.fetched_pages):
            raise EngineError(f"{first.plan.design.name}: repeated runs moved different pages: they cannot be compared")
    by_step = zip(*(run.timelines for run in runs), strict=True)
    timelines = tuple(min(same, key=lambda timeline: timeline.seconds) for same in by_step)
    return MachineRun(first.plan, timelines, first.traffic)


def _moved(layer: Layer) -> tuple[float, ...]:
    counts = layer.counts
    return (
        counts.missed[Stage.PREFETCH],
        counts.fetched[Stage.PREFETCH],
        counts.missed[Stage.DEMAND],
        counts.fetched[Stage.DEMAND],
        counts.written_back,
        counts.requested,
    )


def _traffic(plan: DecodePlan, layers: Sequence[Layer], counts: np.ndarray) -> Traffic:
    """`counts`: `[steps, layers, 6]`."""
    columns = [counts[:, :, column].astype(np.float64) for column in range(counts.shape[2])]
    spec_heads, spec_pages, demand_heads, demand_pages, write_back, requested = columns
    fetching = np.array([isinstance(layer, OffloadedLayer | StreamedLayer) for layer in layers], dtype=np.float64)
    heads = fetching * plan.offloaded_heads
    # a layer that is streamed has no sets that could be kept
    choosing = (
        np.array([isinstance(layer, OffloadedLayer) for layer in layers], dtype=np.float64) * plan.offloaded_heads
    )
    return Traffic(
        spec_heads=spec_heads,
        spec_pages=spec_pages,
        demand_heads=demand_heads,
        demand_pages=demand_pages,
        write_back_pages=write_back,
        requested_pages=requested,
        reused_heads=np.maximum(0.0, choosing - demand_heads),
        heads=float(heads.sum()),
        overlap=float("nan"),
        # an indexer chooses for the one KV head that there is
        spec_sequences=spec_heads if plan.design.asks_indexer else None,
        demand_sequences=demand_heads if plan.design.asks_indexer else None,
    )
