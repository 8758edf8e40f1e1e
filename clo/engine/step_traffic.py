"""What a decode step moved between host and device. Knows nothing about time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clo.engine.layers import Layer, OffloadedLayer, StreamedLayer
from clo.plan import DecodePlan
from clo.schedule.ops import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTraffic:
    """What one decode step moved, and how its heads fared. Pages and heads are summed over layers and batch."""

    fetched_pages: int
    prefetched_pages: int
    requested_pages: int
    written_back_pages: float
    demand_misses: int
    offloaded_heads: int
    page_bytes: float

    @classmethod
    def of(cls, plan: DecodePlan, layers: Sequence[Layer]) -> StepTraffic:
        """Summed over `layers`."""
        counts = [layer.counts for layer in layers]
        offloaded = sum(isinstance(layer, StreamedLayer | OffloadedLayer) for layer in layers)
        return cls(
            fetched_pages=sum(count.fetched[Stage.DEMAND] for count in counts),
            prefetched_pages=sum(count.fetched[Stage.PREFETCH] for count in counts),
            requested_pages=sum(count.requested for count in counts),
            written_back_pages=sum(count.written_back for count in counts),
            demand_misses=sum(count.missed[Stage.DEMAND] for count in counts),
            offloaded_heads=plan.offloaded_heads * offloaded,
            page_bytes=plan.page_bytes,
        )

    @property
    def h2d_bytes(self) -> float:
        """Bytes from the host to the device."""
        return (self.fetched_pages + self.prefetched_pages) * self.page_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the attended pages that needed no transfer in their step (1 where nothing is fetched)."""
        moved = self.fetched_pages + self.prefetched_pages
        return 1.0 - min(1.0, moved / self.requested_pages) if self.requested_pages else 1.0
