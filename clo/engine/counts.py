"""What one layer moved in a step, counted when somebody asks: a step itself reads no number back from the device.

Knows nothing about how pages are chosen or moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from clo.schedule.ops import Stage


def _by_stage() -> dict[Stage, int]:
    return dict.fromkeys(Stage, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """Heads that missed and pages that moved in the last step, summed over the batch."""

    missed: dict[Stage, int] = field(default_factory=_by_stage)
    fetched: dict[Stage, int] = field(default_factory=_by_stage)
    requested: int = 0
    written_back: int = 0
