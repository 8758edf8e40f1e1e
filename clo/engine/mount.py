"""What a loaded `transformers` model is given while a cache of `offload` is open: hooks, and an attention.

With any other cache the model works as before. Knows nothing about designs.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from clo.engine.models.library import given_cache
from clo.engine.models.network import Network, Rotation
from clo.engine.torch_modes import uncompiled
from clo.errors import SpecError

ATTENTION_NAME = "clo"
ATTENTION_WITH_SINKS_NAME = "clo_with_sinks"


class Mounted(ABC):
    """A cache that a model tells what it does."""

    given_mask: Any = None
    """What the model was given, of tokens or of pairs."""

    @abstractmethod
    def check_mode(self) -> None:
        """Raises `SpecError` for a model that is about to leave its cache out."""

    @abstractmethod
    def arrive(self, hidden: torch.Tensor, mask: Any, positions: torch.Tensor | None) -> None:
        """New tokens `[batch, tokens, hidden_size]` are about to run."""

    @abstractmethod
    def before_layer(
        self, layer: int, hidden: torch.Tensor, rotation: Rotation, positions: torch.Tensor | None
    ) -> None:
        """Decoder layer `layer` is about to run."""

    @abstractmethod
    def holds(self, layer: int) -> bool:
        """Whether a layer decodes under the design, and not in a window."""

    @abstractmethod
    def attend(self, arrived: Arrived, query: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
        """Attention output `[batch, tokens, query_heads, head_dim]` under the design."""

    @abstractmethod
    def attended(self, arrived: Arrived, query: torch.Tensor, output: torch.Tensor) -> None:
        """A layer's attention has run, under the design or in a window."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """New keys and values `[batch, kv_heads, tokens, head_dim]` of a layer, on their way to its attention; of latent
    attention the values' share of vectors, and their rest."""

    cache: Mounted
    layer: int
    key: torch.Tensor
    value: torch.Tensor


class Mount:
    """What a model is given as long as any cache uses it. It does not know the caches."""

    def __init__(self, network: Network) -> None:
        _register()
        self._network = network
        self._attention_before = network.decoder.config._attn_implementation
        self._users: set[int] = set()
        self._hooks = [
            layer.register_forward_pre_hook(_BeforeLayer(index), with_kwargs=True)
            for index, layer in enumerate(network.layers)
        ]
        # windowed layers, the first of which may be one, are given no mask that shows all of a prompt
        self._hooks.append(network.decoder.register_forward_pre_hook(_before_all, with_kwargs=True))
        network.decoder.set_attn_implementation(ATTENTION_WITH_SINKS_NAME if network.has_sinks else ATTENTION_NAME)
        network.model.clo_mount = self

    @staticmethod
    def on(network: Network) -> Mount:
        """The one of this model."""
        return vars(network.model).get("clo_mount") or Mount(network)

    def join(self, user: int) -> None:
        """A cache uses it."""
        self._users.add(user)

    def leave(self, user: int) -> None:
        """A cache uses it no more; after the last the model is as it was."""
        self._users.discard(user)
        if self._users:
            return
        for hook in self._hooks:
            hook.remove()
        for attention in self._network.attentions:
            vars(attention).pop("clo_layer", None)
        vars(self._network.model).pop("clo_mount", None)
        self._network.decoder.set_attn_implementation(self._attention_before)


def hand_over(network: Network, arrived: Arrived) -> None:
    """To the layer's attention, which is asked next."""
    network.layers[arrived.layer].self_attn.clo_layer = arrived


def _register() -> None:
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    AttentionInterface.register(ATTENTION_WITH_SINKS_NAME, _attend_with_sinks)
    AttentionMaskInterface.register(ATTENTION_WITH_SINKS_NAME, eager_mask)


@uncompiled
def _before_all(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs before the model's layers and what is in front of them, whatever cache the model was given."""
    cache = given_cache(kwargs)
    if isinstance(cache, Mounted):
        cache.check_mode()
        cache.given_mask = kwargs["attention_mask"] if "attention_mask" in kwargs else (*args, None, None)[1]


@dataclass(frozen=True, slots=True)
class _BeforeLayer:
    """Runs before decoder layer `layer`, whatever cache the model was given."""

    layer: int

    @uncompiled
    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = given_cache(kwargs)
        if isinstance(cache, Mounted):
            hidden = args[0] if args else kwargs["hidden_states"]
            positions = kwargs.get("position_ids")
            if self.layer == 0:
                cache.arrive(hidden, cache.given_mask, positions)
            cache.before_layer(self.layer, hidden, kwargs["position_embeddings"], positions)

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """A copy would attend through caches that do not know it."""
        raise SpecError("model: it cannot be copied while a cache of offload() is open: close() the cache before")


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """SDPA, but for tokens that a full layer of a `Mounted` cache has just taken in."""
    return _attend_by(sdpa_attention_forward, module, query, key, value, attention_mask, **options)


def _attend_with_sinks(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """The same of a model whose sinks SDPA leaves out: its own attention."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return _attend_by(own, module, query, key, value, attention_mask, **options)


@uncompiled
def _attend_by(
    own: Callable[..., Any], module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
) -> Any:
    arrived: Arrived | None = vars(module).pop("clo_layer", None)
    if arrived is None:
        return own(module, query, key, value, mask, **options)
    cache = arrived.cache
    if cache.holds(arrived.layer):
        found = cache.attend(arrived, query, options.get("s_aux")), None
    else:
        found = own(module, query, key, value, mask, **options)
    cache.attended(arrived, query, found[0])
    return found
