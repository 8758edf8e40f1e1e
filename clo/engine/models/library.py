"""What versions of `transformers` call differently: a cache `past_key_values`, since 5.24 `cache`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

from clo.errors import SpecError

NAMES = ("cache", "past_key_values", "cache_params")
"""Newest first; the last one's is linear attention, before 5.24."""


def given_cache(kwargs: dict[str, Any]) -> Any:
    """What a model, or a part of it, is being given as its cache, if anything; it takes older names as well."""
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def as_cache(module: Any, cache: Any) -> dict[str, Any]:
    """Arguments that give `cache` to a model, or to a part of it, under the name that its version has for it.

    Raises `SpecError` for one that takes none.
    """
    if name := _name_in(type(module).forward):
        return {name: cache}
    raise SpecError(f"model {type(module).__name__}: it takes no cache ({' or '.join(NAMES)})")


@remembered
def _name_in(forward: Callable[..., Any]) -> str:
    named = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in named), "")
