"""Layers of the cache that `transformers` is given: until a prompt is complete they are the library's own.

From the first decoded token on the design's cache takes over from full layers; those with a sliding window stay as they
are, and so do those with linear attention (`linear_layer.py`). Knows nothing about designs.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from clo.engine.prefill import query_length
from clo.engine.torch_modes import uncompiled
from clo.errors import EngineError, SpecError


class Owner(Protocol):
    """The cache that has these layers."""

    @property
    def decodes(self) -> bool:
        """Whether the prompt is complete."""

    def check_open(self) -> None:
        """Raises `EngineError` once it is closed."""

    def check_dtype(self, *new: torch.Tensor) -> None:
        """Raises `SpecError` for keys or values of another type than those that there is room for."""

    def arrived(self, layer: int) -> None:
        """Layer `layer` has the new tokens."""

    def take(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """New tokens of each sequence, `[batch, kv_heads, tokens, head_dim]`, while decoding."""

    def mixed(self, layer: int, states: torch.Tensor) -> None:
        """A layer with linear attention has its new states."""

    def decoded_length(self, layer: int) -> int:
        """Tokens that `layer` has while decoding."""


class Owned:
    """What every layer refuses."""

    is_croppable = False
    keys: Any
    values: Any

    def belong(self, cache: Owner, index: int) -> None:
        """To be layer `index` of `cache`."""
        # the cache owns its layers: the other way round it would live until a garbage collection
        self._owner, self.index = weakref.ref(cache), index

    @property
    def cache(self) -> Owner:
        """What it is a layer of."""
        cache = self._owner()
        assert cache is not None, "a layer does not outlive its cache"
        return cache

    def release(self) -> None:
        """What the library keeps here is not needed any more."""
        self.keys = self.values = None

    def reset(self) -> None:
        """Not possible once decoding has begun."""
        if self.cache.decodes:
            raise EngineError("cache: it has decoded already: offload() anew for another prompt")
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search keeps several continuations of one prompt, which this cache does not."""
        raise SpecError("cache: beam search is not supported: sample or decode greedily")

    batch_repeat_interleave = batch_select_indices = reorder_cache

    def crop(self, max_length: int) -> None:
        """Assisted generation takes back tokens that it guessed, which this cache does not."""
        raise SpecError("cache: tokens cannot be taken back: generate without an assistant model or prompt lookup")


class FullLayer(Owned, DynamicLayer):  # type: ignore[misc]
    """Grows with the prompt as the library's own; from the first decoded token on the design's cache takes over."""

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values; while decoding, those of the new tokens: attention knows where the rest is."""
        self.cache.check_open()
        self.cache.check_dtype(key_states, value_states)
        if not self.cache.decodes:
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
            self.cache.arrived(self.index)
            return grown
        self.cache.take(self.index, key_states, value_states)
        return key_states, value_states

    @uncompiled
    def get_seq_length(self) -> int:
        """Tokens seen so far. Raises `EngineError` if the prompt's are dropped."""
        if self.cache.decodes:
            return self.cache.decoded_length(self.index)
        self.cache.check_open()
        return int(super().get_seq_length())

    @uncompiled
    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        """Every cached token and the new ones; of one token that is decoded no mask is made."""
        count = query_length(query)
        alone = self.cache.decodes and count == 1
        return self.get_seq_length() + (0 if alone else count), 0


class WindowedLayer(Owned, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The library's own: what the next token sees of its window, on the device. Attention there is the model's own."""

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the new tokens see: of those before them the window, and themselves."""
        self.cache.check_open()
        self.cache.check_dtype(key_states, value_states)
        seen: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
        if key_states.shape[2] > 1:
            # a view would keep the whole prompt
            self.keys, self.values = self.keys.clone(), self.values.clone()
        if self.cache.decodes:
            self.cache.take(self.index, key_states, value_states)
        else:
            self.cache.arrived(self.index)
        return seen
