"""A layer's part of a decode step on one thread, in the order in which the schedule lets things happen.

For callers that drive the model themselves, such as `transformers`. The same operations as on a machine with lanes, so
the same answers; nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clo.engine.layers import OffloadedLayer
from clo.engine.layers.selection import candidates
from clo.engine.words import wait_for_device
from clo.plan import DecodePlan
from clo.schedule.ops import Stage
from clo.specs import Cache


def prefetch(layer: OffloadedLayer, predicted: torch.Tensor, lengths: torch.Tensor) -> None:
    """Choose and fetch by a predicted query `[batch, query_heads, head_dim]`, before the layer runs."""
    _choose(layer, Stage.PREFETCH, predicted, lengths)
    layer.gather(Stage.PREFETCH)


def attend(
    layer: OffloadedLayer,
    query: torch.Tensor,
    lengths: torch.Tensor,
    *,
    was_predicted: bool,
    sink_logits: torch.Tensor | None = None,
    observe: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """What the real query still misses is fetched; then attention, `[batch, query_heads, head_dim]`.

    `sink_logits` `[query_heads]` take their share of the softmax. `observe` is told the output while the layer still
    holds what was attended.
    """
    design = layer.design
    if not (design.cache is Cache.NONE and was_predicted):
        _choose(layer, Stage.DEMAND, query, lengths)
        if design.offloads:
            layer.gather(Stage.DEMAND)
    attended = layer.attend(query, lengths, sink_logits)
    if observe is not None:
        observe(attended)
    if design.speculates_last_step:
        layer.gate.the_others_miss(query)
        _select(layer, Stage.PREFETCH, query, lengths)
        layer.gather(Stage.PREFETCH)
    return attended


def predicts(plan: DecodePlan, layer: int) -> int | None:
    """The layer whose query is predicted from the input of `layer`: none where the schedule fetches nothing ahead."""
    design, target = plan.design, layer + plan.design.prefetch_depth
    return target if design.prefetches_layers and design.selects and plan.is_sparse(target) else None


def _choose(layer: OffloadedLayer, stage: Stage, query: torch.Tensor, lengths: torch.Tensor) -> None:
    if layer.follows is not None:
        pass  # the layer whose choice this one shares has been asked
    elif layer.design.gated:
        layer.gate.test(stage, query)
    else:
        layer.gate.everyone_misses(stage)
    _select(layer, stage, query, lengths)


def _select(layer: OffloadedLayer, stage: Stage, query: torch.Tensor, lengths: torch.Tensor) -> None:
    usable = candidates(layer.design, lengths)
    layer.score(stage, query, lengths, usable)
    layer.select(stage, usable)
    if layer.design.cache in (Cache.LRU, Cache.HEAD_REUSE):
        if layer.residency.on_cpu:
            layer.residency.letter(stage).bring()
            wait_for_device(layer.shape.device)
        layer.resolve(stage)
