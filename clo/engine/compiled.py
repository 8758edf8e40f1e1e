"""How this package stands beside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Left out of a compiled model: it runs as written, between what is compiled before and after it."""
    return cast(F, torch.compiler.disable(function))
