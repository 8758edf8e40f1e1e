"""How much moves in each step and layer: the counts that a schedule's `Amount`s refer to. Knows nothing about time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo.schedule.work import Amount, AmountName

Counts = NDArray[np.float64]

COUNTS = (
    "spec_heads",
    "spec_pages",
    "demand_heads",
    "demand_pages",
    "write_back_pages",
    "requested_pages",
    "reused_heads",
)
"""The fields of `Traffic` that are counts."""
SEQUENCE_COUNTS = ("spec_sequences", "demand_sequences")
"""Those that are there only where a model's own indexer chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Counts per step and layer `[steps, layers]`, summed over the batch and its KV heads.

    `spec_*` belongs to prefetches, `demand_*` to what the real query asks for; `requested_pages` are the pages that
    heads attended through slots, `reused_heads` those that attended an unchanged set. `overlap` is the share of the
    attended pages that the selector would choose for the real query, averaged over everything (1: nothing is stale).
    `*_sequences` are those in which a head selects, where a model's own indexer chooses (its keys are of all heads).
    """

    spec_heads: Counts
    spec_pages: Counts
    demand_heads: Counts
    demand_pages: Counts
    write_back_pages: Counts
    requested_pages: Counts
    reused_heads: Counts
    heads: float
    overlap: float
    spec_sequences: Counts | None = None
    demand_sequences: Counts | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Measured decode steps."""
        return int(self.spec_pages.shape[0])

    def amount(self, name: AmountName) -> Counts:
        """The counts an `Amount` of this name stands for, `[steps, layers]`."""
        counts: Counts | None = getattr(self, name)
        if counts is None:
            raise ValueError(f"{name}: counted only where a model's own indexer chooses")
        return counts

    def evaluate(self, amount: Amount) -> Counts:
        """Scaled counts `[steps, layers]`."""
        return amount.scale * self.amount(amount.name)

    @property
    def fetched_pages(self) -> Counts:
        """Pages moved host to device, `[steps, layers]`."""
        return self.spec_pages + self.demand_pages

    @property
    def hit_rate(self) -> float:
        """Share of the attended pages that needed no transfer in their step (1 when nothing is offloaded)."""
        requested = float(self.requested_pages.sum())
        return 1.0 - min(1.0, float(self.fetched_pages.sum()) / requested) if requested else 1.0

    @property
    def reuse_rate(self) -> float:
        """Share of offloaded heads whose real query accepted the set at hand without an on-demand selection."""
        return float(self.reused_heads.mean(axis=0).sum()) / self.heads if self.heads else 1.0

    def steps(self, start: int, stop: int) -> Traffic:
        """The same traffic, only some of the steps."""
        names = [*COUNTS, *(name for name in SEQUENCE_COUNTS if getattr(self, name) is not None)]
        cut: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in names}
        return replace(self, **cut)
