"""What a design must beat: the same design whose sets are renewed by a clock, or hold nothing at all.

Each is the design with its gate replaced. Knows nothing about how answers are judged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clo.engine.heads import HeadProfile
from clo.engine.layers import NEVER
from clo.specs import Cache, Design, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A design to evaluate. With `paced_by`, heads select by a clock as often as those of the design so named."""

    name: str
    design: Design
    heads: HeadProfile | None = None
    paced_by: str | None = None

    def paced(self, refresh_rate: float) -> Contender:
        """With the clock set: each KV head selects in this share of the steps."""
        return replace(self, heads=replace(self.heads or HeadProfile(), refresh_rate=min(1.0, refresh_rate)))


def controls_of(contender: Contender, model: ModelSpec) -> list[Contender]:
    """Of a gated design: renewed by a clock as often as its gate renews, and sinks and window only."""
    design, heads = contender.design, contender.heads or HeadProfile()
    if design.cache is not Cache.HEAD_REUSE:
        return []
    never = torch.full((model.num_layers, model.num_kv_heads), NEVER)
    blind = design.with_fields(prefetch_depth=0)
    return [
        Contender(name=f"{contender.name}, by clock", design=design, heads=heads, paced_by=contender.name),
        Contender(name="sinks and window only", design=blind, heads=replace(heads, tau=never)),
    ]
