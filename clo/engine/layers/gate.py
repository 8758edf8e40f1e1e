"""Which KV heads select anew: those whose query has drifted, or all of them, or those whose turn it is."""

from __future__ import annotations

import torch

from clo.engine.layers.shape import NEVER, HeadSettings, LayerShape
from clo.schedule.ops import Stage
from clo.specs import Design


class Gate:
    """Anchors and thresholds of one layer, and the heads that each stage found to miss.

    `missed`: by stage, bool `[batch, kv_heads]`. `anchor`: `[batch, query_heads, head_dim]`. `tau`: `[kv_heads]`.
    """

    def __init__(self, design: Design, shape: LayerShape, heads: HeadSettings) -> None:
        self._design, self._shape, self._refresh_rate = design, shape, heads.refresh_rate
        self._kernels = shape.kernels
        size = (shape.batch, shape.num_query_heads, shape.head_dim)
        self.anchor = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        self.tau = heads.tau.to(shape.device, torch.float32).clone()
        self.tau[list(heads.pinned)] = NEVER
        self._importance = None if heads.importance is None else heads.importance.to(shape.device)
        self.missed = {stage: torch.zeros(shape.rows, dtype=torch.bool, device=shape.device) for stage in Stage}
        self._steps = self._clocked = 0

    def begin(self) -> None:
        """A step begins."""
        self._steps += 1

    def test(self, stage: Stage, query: torch.Tensor) -> None:
        """Heads miss whose `query` `[batch, query_heads, head_dim]` has drifted from its anchor."""
        if self._refresh_rate is not None:
            self._by_clock(stage, self._refresh_rate)
            return
        fold, importance = self._design.gqa_fold.value, self._importance
        self._kernels.hit_test(query, self.anchor, self.tau, fold=fold, importance=importance, out=self.missed[stage])

    def _by_clock(self, stage: Stage, rate: float) -> None:
        """Heads take turns: head h selects when `steps * rate + h / heads` passes a whole number; all in the first.

        Only the first test of a step counts.
        """
        step = self._steps
        phase = torch.arange(self._shape.num_kv_heads) / self._shape.num_kv_heads
        due = ((step * rate + phase).floor() > ((step - 1) * rate + phase).floor()) | (step == 1)
        due &= torch.tensor(step > self._clocked)
        self._clocked = step
        self.missed[stage].copy_((due.to(self._shape.device) & (self.tau != NEVER)).expand_as(self.missed[stage]))

    def everyone_misses(self, stage: Stage) -> None:
        """Without a gate every head selects, but for the pinned ones."""
        self.missed[stage].copy_((self.tau != NEVER).expand_as(self.missed[stage]))

    def the_others_miss(self, query: torch.Tensor) -> None:
        """Heads that were not corrected choose, by this step's query, what the next step attends."""
        rest = ~self.missed[Stage.DEMAND] & (self.tau != NEVER)
        self.missed[Stage.PREFETCH].copy_(rest)
        group = self._shape.num_query_heads // self._shape.num_kv_heads
        moved = rest.repeat_interleave(group, dim=1)[..., None]
        self.anchor.copy_(torch.where(moved, query, self.anchor))
