"""Reads a prompt in chunks: while one is computed, the pages of those before it go to the host and are indexed.

The model's own forward pass and attention, through the library's own cache. Of the layers whose KV cache is on the host
only the one that is computed has the prompt's keys and values on the device, and the next one's are being fetched.
Knows nothing about prompts' text, about decode steps or about time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from clo.engine.carrier import Carrier, Errand
from clo.engine.layers import (
    DenseLayer,
    Layer,
    LayerShape,
    LinearLayer,
    OffloadedLayer,
    StreamedLayer,
    WindowedLayer,
)
from clo.engine.layers.linear import empty_library_cache, states_of
from clo.engine.models.network import Network
from clo.plan import DecodePlan

PREFILL_CHUNK_TOKENS = 512
CUDA_CHUNK_TOKENS = 2048
"""Every chunk brings all earlier ones back over the link, `tokens^2 / (2 * chunk)` tokens a layer."""


def usual_chunk(device: torch.device) -> int:
    """Tokens that are read at once on `device`."""
    return CUDA_CHUNK_TOKENS if device.type == "cuda" else PREFILL_CHUNK_TOKENS


def read_into(
    layers: Sequence[Layer],
    sequence: int,
    network: Network,
    tokens: torch.Tensor,
    *,
    patience_s: float,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Read the prompt `tokens` `[tokens]` into new `layers` as their `sequence`; logits `[vocab_size]` of what follows.

    Raises `EngineError` naming layer and pages where they could not be moved; the layers then hold part of a prompt.
    """
    size = chunk_tokens or usual_chunk(network.device)
    with torch.inference_mode(), Carrier(network.device, patience_s) as carrier:
        belt = _Belt(carrier, len(tokens), size)
        cache = _PrefillCache(layers, sequence, belt)
        try:
            for start in range(0, len(tokens), size):
                chunk = tokens[None, start : start + size].to(network.device)
                logits = network.read(chunk, cache, len(tokens))
            carrier.wait(carrier.ask("end of the prompt", _nothing))
            cache.hand_over()
        finally:
            belt.clear()
    last: torch.Tensor = logits[0, -1]
    return last


def prefill_bytes(plan: DecodePlan, tokens: int) -> float:
    """Device bytes that reading a prompt of this length needs beside what decoding needs, without activations.

    Two layers' keys and values of one sequence, of the layer that is computed and of the next; all keys of a model's
    own indexers, which are handed over at the prompt's end.
    """
    model = plan.model
    indexers = [model.indexer_in(layer) for layer in range(model.num_layers)]
    keys = model.kv_bytes_per_value * sum(each.head_dim for each in indexers if each is not None)
    return tokens * ((2 * model.layer_token_bytes if plan.sparse_layers else 0.0) + keys)


def _nothing() -> None:
    pass


def query_length(query: int | torch.Tensor) -> int:
    """How many new tokens the library asks a mask for: some of its versions say their number, some their positions."""
    return query if isinstance(query, int) else len(query)


class _PrefillCache(Cache):  # type: ignore[misc]
    """What the model takes for its KV cache: layers that pass on what they are given. One sequence."""

    def __init__(self, layers: Sequence[Layer], sequence: int, belt: _Belt) -> None:
        super().__init__(layers=[_passing(layer, sequence, index, belt) for index, layer in enumerate(layers)])
        self._given, self._sequence = tuple(layers), sequence

    def hand_over(self) -> None:
        """What is taken in at a prompt's end only: states of linear attention, keys of a model's own indexer."""
        for layer, kept in zip(self._given, self.layers, strict=True):
            if isinstance(layer, LinearLayer):
                conv, states = states_of(kept)
                layer.load(self._sequence, conv[0], states[0])
            elif (keys := kept.indexer_keys) is not None and isinstance(layer, OffloadedLayer):
                layer.load_indexer_keys(self._sequence, keys[0])


def _passing(layer: Layer, sequence: int, index: int, belt: _Belt) -> Any:
    if isinstance(layer, LinearLayer):
        return empty_library_cache([True]).layers[0]
    if isinstance(layer, WindowedLayer):
        return _WindowedPrompt(layer, sequence)
    if isinstance(layer, OffloadedLayer):
        return belt.add(_OffloadedPrompt(layer, sequence, index, belt), layer.shape)
    if isinstance(layer, StreamedLayer):
        return belt.add(_StreamedPrompt(layer, sequence, index, belt), layer.shape)
    return _DensePrompt(layer, sequence)


class _PassingLayer(CacheLayerMixin):  # type: ignore[misc]
    """Counts tokens, and says nothing else of what it has: it cannot be cut, reordered or used for a batch."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.indexer_keys: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """All keys of the model's own indexer so far, `[1, tokens, key_dim]`, from those of a chunk."""
        known = () if self.indexer_keys is None else (self.indexer_keys,)
        self.indexer_keys = torch.cat([*known, indexer_key_states], dim=1)
        return self.indexer_keys

    def lazy_initialization(self, *_: torch.Tensor) -> None:
        """The decoder's layers have their room already."""

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        """Tokens to attend, and the first of them."""
        return self.seen + query_length(query), 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As versions of the library before `get_max_length` call it."""
        return -1


class _DensePrompt(_PassingLayer):
    """Everything stays on the device, where it is attended in place."""

    def __init__(self, layer: DenseLayer, sequence: int) -> None:
        super().__init__()
        self._layer, self._sequence = layer, sequence

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, `[1, kv_heads, tokens, head_dim]`, from those of a chunk."""
        self._layer.load(self._sequence, key_states[0], value_states[0], first=self.seen)
        self.seen += key_states.shape[2]
        kv = self._layer.kv[self._sequence, :, :, : self.seen]
        return self._layer.shape.parted(kv.transpose(0, 1)[:, None])


class _WindowedPrompt(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The library's own: it knows how long the mask is. The layer takes what is in its window after each chunk."""

    def __init__(self, layer: WindowedLayer, sequence: int) -> None:
        # what a query sees of a window that is longer than all there will be is no less than all
        super().__init__(sliding_window=layer.shape.max_tokens)
        self._layer, self._sequence, self._seen = layer, sequence, 0
        self.indexer_keys = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tokens of a chunk see: of those before it the window, and themselves."""
        self._layer.load(self._sequence, key_states[0], value_states[0], first=self._seen)
        self._seen += key_states.shape[2]
        seen: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states)
        # a view would keep the whole chunk; of a window of one token the library keeps everything
        kept = min(self.keys.shape[2], self.sliding_window - 1)
        self.keys: torch.Tensor = self.keys[:, :, self.keys.shape[2] - kept :].clone()
        self.values: torch.Tensor = self.values[:, :, self.values.shape[2] - kept :].clone()
        return seen


class _HostedPrompt(_PassingLayer):
    """A layer whose prompt is on the host: on the device it is while it is attended."""

    def __init__(self, shape: LayerShape, index: int, belt: _Belt) -> None:
        super().__init__()
        self.index, self._shape, self._belt = index, shape, belt

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, `[1, kv_heads, tokens, head_dim]`, from those of a chunk."""
        kv = self._belt.take(self)
        for row, given in zip(kv, self._shape.rows_of(key_states[0], value_states[0]), strict=True):
            row[:, self.seen :] = given
        self.seen += key_states.shape[2]
        self._belt.pass_on(self, kv, key_states.shape[2])
        return self._shape.parted(kv[:, None])

    @abstractmethod
    def fetch(self, out: torch.Tensor) -> None:
        """The prompt so far, as many tokens as `out` `[rows_per_token, kv_heads, tokens, head_dim]` has room for."""

    @abstractmethod
    def store(self, kv: torch.Tensor, *, complete: bool) -> None:
        """What is new in the prompt so far, `[rows_per_token, kv_heads, tokens, head_dim]`.

        `complete`: no more of it will come.
        """

    @abstractmethod
    def part(self, first: int, end: int) -> str:
        """These tokens as an error calls them."""


class _StreamedPrompt(_HostedPrompt):
    def __init__(self, layer: StreamedLayer, sequence: int, index: int, belt: _Belt) -> None:
        super().__init__(layer.shape, index, belt)
        self._layer, self._sequence, self._stored = layer, sequence, 0

    def fetch(self, out: torch.Tensor) -> None:
        self._layer.fetch(self._sequence, out)

    def store(self, kv: torch.Tensor, *, complete: bool) -> None:
        new = kv[:, :, self._stored :]
        self._layer.load(self._sequence, *self._layer.shape.parted(new), first=self._stored)
        self._stored = kv.shape[2]

    def part(self, first: int, end: int) -> str:
        return f"tokens {first} to {end - 1}"


class _OffloadedPrompt(_HostedPrompt):
    """Pages go to the host as they become complete. What is no such page stays on the device until it is one, or until
    the prompt ends and it is the window's."""

    def __init__(self, layer: OffloadedLayer, sequence: int, index: int, belt: _Belt) -> None:
        super().__init__(layer.shape, index, belt)
        self._layer, self._sequence, self._stored = layer, sequence, 0
        # of the tokens in the window, none is ever the host's
        self._pages = layer.pages_of_prompt(belt.tokens)
        self._rest: torch.Tensor | None = None

    def fetch(self, out: torch.Tensor) -> None:
        tokens = self._stored * self._layer.page_size
        self._layer.fetch_pages(self._sequence, self._stored, out[:, :, :tokens])
        if self._rest is not None:
            out[:, :, tokens:] = self._rest

    def store(self, kv: torch.Tensor, *, complete: bool) -> None:
        size, first = self._layer.page_size, self._stored
        full = min(kv.shape[2] // size, self._pages)
        self._layer.load_pages(self._sequence, first, kv[:, :, first * size : full * size])
        self._stored = full
        self._rest = None if complete else kv[:, :, full * size :].clone()
        if complete:
            self._layer.load_rest(self._sequence, full, kv[:, :, full * size :])

    def part(self, first: int, end: int) -> str:
        return f"pages {first // self._layer.page_size} to {(end - 1) // self._layer.page_size}"


class _Belt:
    """Two device buffers that hosted layers use in turn: the one's prompt is attended while the next one's arrives."""

    def __init__(self, carrier: Carrier, tokens: int, chunk_tokens: int) -> None:
        self.tokens = tokens
        self._carrier, self._chunk_tokens = carrier, chunk_tokens
        self._buffers: list[torch.Tensor] = []
        self._rows = self._heads = self._head_dim = 0
        self._prompts: list[_HostedPrompt] = []
        self._turn = 0
        self._coming: tuple[Errand, torch.Tensor] | None = None

    def add(self, prompt: _HostedPrompt, shape: LayerShape) -> _HostedPrompt:
        """Layers take turns in the order in which they are added."""
        self._rows, self._heads, self._head_dim = shape.rows_per_token, shape.num_kv_heads, shape.head_dim
        if not self._buffers:
            size = self._rows * self._heads * self.tokens * self._head_dim
            self._buffers = [torch.empty(size, dtype=shape.dtype, device=shape.device) for _ in range(2)]
        self._prompts.append(prompt)
        return prompt

    def clear(self) -> None:
        """Forget the layers, which know the belt: else nobody but a garbage collection would free them."""
        self._prompts, self._buffers, self._coming = [], [], None

    def take(self, prompt: _HostedPrompt) -> torch.Tensor:
        """Room for the prompt up to the end of this chunk, `[rows_per_token, kv_heads, tokens, head_dim]`.

        What came before it is there already.
        """
        if self._coming is None:
            self._fetch_next()
        assert self._coming is not None
        assert self._prompts[(self._turn - 1) % len(self._prompts)] is prompt, "layers run in another order"
        errand, kv = self._coming
        self._carrier.wait(errand)
        return kv

    def pass_on(self, prompt: _HostedPrompt, kv: torch.Tensor, new_tokens: int) -> None:
        """The layer's prompt has grown to `kv`, and is attended now: meanwhile its new pages go to the host."""
        if len(self._prompts) > 1:
            # what will be waited for comes before what nobody waits for
            self._fetch_next()
        first, complete = prompt.seen - new_tokens, prompt.seen == self.tokens
        what = f"storing {prompt.part(first, prompt.seen)} of layer {prompt.index}"
        self._carrier.ask(what, lambda: prompt.store(kv, complete=complete))
        if len(self._prompts) == 1:
            self._fetch_next()

    def _fetch_next(self) -> None:
        """Have the next layer's earlier chunks brought into the buffer of the layer before the one that runs now, of
        which the carrier has stored everything when it comes to this."""
        prompt = self._prompts[self._turn % len(self._prompts)]
        buffer = self._buffers[self._turn % 2]
        seen, end = prompt.seen, min(prompt.seen + self._chunk_tokens, self.tokens)
        self._coming = None
        if seen == end:
            return
        self._turn += 1
        # contiguous, as the library's own cache has it
        size = (self._rows, self._heads, end, self._head_dim)
        kv = buffer[: math.prod(size)].view(size)
        what = f"fetching {prompt.part(0, max(1, seen))} of layer {prompt.index}"
        self._coming = self._carrier.ask(what, lambda: prompt.fetch(kv[:, :, :seen]) if seen else None), kv
