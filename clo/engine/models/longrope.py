"""LongRoPE: long texts are rotated by other factors than short ones. Knows nothing about what is cached.

Phi's models with 128K positions do so (arXiv 2402.13753, section 3.3). Which factors are meant the library tells by the
last position that it is given, so a text that is read in parts would be rotated by both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from clo.engine.versions import release_of

ON_DEVICE = (5, 21)
"""Versions of `transformers` that choose the factors there."""


def switches_of(config: Any) -> tuple[int, ...]:
    """Tokens of the longest text of each kind that is rotated otherwise than the next longer ones, ascending."""
    given = getattr(config, "rope_parameters", None) or {}
    # kinds of layers may have parameters of their own
    kinds = [given, *(each for each in given.values() if isinstance(each, dict))]
    switches = {each.get("original_max_position_embeddings") for each in kinds if each.get("rope_type") == "longrope"}
    return tuple(sorted(each for each in switches if each is not None and each < config.max_position_embeddings))


def longest_alike(switches: tuple[int, ...], tokens: int, most: int) -> int:
    """Tokens of the longest text that is rotated as one of `tokens` tokens, of those with up to `most`."""
    at = bisect_left(switches, tokens)
    return min(most, switches[at]) if at < len(switches) else most


def host_chooses() -> bool:
    """Whether this version of the library chooses the factors on the host, not on the device."""
    return release_of(transformers.__version__) < ON_DEVICE


@contextmanager
def as_of(rotary: Any, tokens: int) -> Iterator[None]:
    """Whatever positions `rotary` is given inside, it takes them for those of a text of `tokens` tokens."""

    def lengthen(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": with_last(kwargs["position_ids"])}
        hidden, places, *rest = args
        return (hidden, with_last(places), *rest), kwargs

    def with_last(places: torch.Tensor) -> torch.Tensor:
        return torch.cat([places, torch.full_like(places[..., :1], tokens - 1)], -1)

    def shorten(_module: Any, _args: tuple[Any, ...], rotation: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(part[..., :-1, :] for part in rotation)

    hooks = [
        rotary.register_forward_pre_hook(lengthen, with_kwargs=True),
        rotary.register_forward_hook(shorten),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
