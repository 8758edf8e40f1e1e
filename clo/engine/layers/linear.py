"""The cache of a layer with linear attention: states, on the device, in the cache of `transformers`.

Knows nothing about designs. Versions of the library before 5.7 have no such layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from clo.engine.counts import LayerCounts
from clo.engine.layers.shape import LayerShape

Pair = tuple[torch.Tensor, torch.Tensor]
"""Tokens that the next convolution spans `[..., conv_width, conv_tokens]`, states `[..., value_heads, key_dim,
value_dim]`."""


def empty_library_cache(linear: Sequence[bool], *, indexed: bool = False) -> Any:
    """The library's cache of a model some of whose layers are `linear`, or one with an indexer of its own."""
    from transformers import cache_utils

    # by their names: the oldest versions of the library have none
    plain = cache_utils.DynamicIndexedLayer if indexed else cache_utils.DynamicLayer
    kinds = [cache_utils.LinearAttentionLayer if is_linear else plain for is_linear in linear]
    return cache_utils.Cache(layers=[kind() for kind in kinds])


def states_of(layer: Any) -> Pair:
    """What a layer of the library's cache keeps of a batch."""
    return _only(layer.conv_states), _only(layer.recurrent_states)


class LinearLayer:
    """Layer `index` of the library's cache `states`, of a whole batch. Nothing of it is selected or moved."""

    def __init__(self, shape: LayerShape, states: Any, index: int) -> None:
        self.shape, self.states = shape, states
        self._layer = states.layers[index]
        self._of_prompts: dict[int, Pair] = {}

    @property
    def counts(self) -> LayerCounts:
        """Nothing moves."""
        return LayerCounts()

    def begin(self, lengths: Sequence[int]) -> None:
        """A step begins: states are as large whatever the lengths."""

    def load(self, sequence: int, conv: torch.Tensor, states: torch.Tensor) -> None:
        """Take in what a prompt left, without the batch. Those of the last prompt make the batch's complete."""
        self._of_prompts[sequence] = conv, states
        if len(self._of_prompts) < self.shape.batch:
            return
        every = [self._of_prompts.pop(each) for each in range(self.shape.batch)]
        self._layer.update_conv_state(torch.stack([conv for conv, _ in every]))
        self._layer.update_recurrent_state(torch.stack([states for _, states in every]))

    @property
    def kept(self) -> Pair:
        """What is kept of the batch."""
        return states_of(self._layer)


def _only(states: Any) -> torch.Tensor:
    """Newer versions of the library number the states of a layer, of which there is one."""
    found: torch.Tensor = states[0]
    return found if isinstance(states, dict) else states
