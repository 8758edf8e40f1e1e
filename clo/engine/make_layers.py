"""The KV cache that a plan asks for. Knows nothing about what its layers do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clo.engine.heads import HeadProfile
from clo.engine.layers import (
    AttendedLayer,
    DenseLayer,
    HeadSettings,
    Layer,
    LayerShape,
    LinearLayer,
    OffloadedLayer,
    StreamedLayer,
    WindowedLayer,
)
from clo.engine.layers.linear import empty_library_cache
from clo.engine.models.network import Network
from clo.engine.words import two_memories
from clo.plan import DecodePlan
from clo.specs import Attend, Sync


def make_layers(network: Network, plan: DecodePlan, heads: HeadProfile, max_tokens: int) -> list[Layer]:
    """The KV cache that `plan` asks for, layer by layer, with room for `max_tokens` a sequence."""
    shape, model = _shape(network, plan, max_tokens), plan.model
    linear = model.linear_flags
    states = empty_library_cache(linear) if any(linear) else None
    layers: list[Layer] = []
    for layer in range(model.num_layers):
        made = LinearLayer(shape, states, layer) if linear[layer] else _make_layer(plan, shape, heads, layer, layers)
        layers.append(made)
    return layers


def make_whole_layers(
    network: Network, plan: DecodePlan, heads: HeadProfile, max_tokens: int
) -> dict[int, AttendedLayer]:
    """The same of the layers that keep the whole context, by the layer's number: no windows, no linear attention."""
    shape = _shape(network, plan, max_tokens)
    return {layer: _make_layer(plan, shape, heads, layer, ()) for layer in plan.model.whole_layers}


def _shape(network: Network, plan: DecodePlan, max_tokens: int) -> LayerShape:
    model = plan.model
    return LayerShape(
        batch=plan.workload.batch,
        num_query_heads=model.num_query_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_tokens=max_tokens,
        dtype=network.dtype,
        device=network.device,
        scale=network.scale,
        value_dim=None if model.latent is None else model.latent.kv_rank,
        recorded=two_memories(network.device) and plan.design.sync is Sync.GRAPH,
    )


def _make_layer(
    plan: DecodePlan, shape: LayerShape, heads: HeadProfile, layer: int, before: Sequence[Layer]
) -> AttendedLayer:
    if layer in plan.model.windowed_layers:
        assert plan.model.window_tokens is not None
        return WindowedLayer(shape, plan.model.window_tokens)
    if not plan.is_sparse(layer):
        return DenseLayer(shape)
    if plan.design.attend is Attend.FULL:
        return StreamedLayer(shape)
    indexer, follows = plan.model.indexer_in(layer), _source(plan, layer, before)
    return OffloadedLayer(plan, shape, _settings(plan, heads, layer), indexer=indexer, follows=follows)


def _source(plan: DecodePlan, layer: int, before: Sequence[Layer]) -> OffloadedLayer | None:
    """The layer whose choice this one shares: the last one with an indexer."""
    if not plan.shares_choice(layer):
        return None
    source = before[max(each for each in range(layer) if plan.model.indexer_in(each) is not None)]
    assert isinstance(source, OffloadedLayer), f"layer {layer} shares the choice of one that makes none"
    return source


def _settings(plan: DecodePlan, heads: HeadProfile, layer: int) -> HeadSettings:
    tau = torch.full((plan.model.num_kv_heads,), plan.design.tau)
    pinned = heads.pinned[layer] if heads.pinned else tuple(range(plan.pinned_heads_per_layer))
    return HeadSettings(
        tau=tau if heads.tau is None else heads.tau[layer],
        importance=None if heads.importance is None else heads.importance[layer],
        pinned=pinned[: plan.pinned_heads_per_layer],
        refresh_rate=heads.refresh_rate,
    )
