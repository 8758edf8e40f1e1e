"""How this package stands beside `torch.compile` and inference mode, whichever a caller is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Left out of a compiled model: it runs as written, between what is compiled before and after it."""
    return cast(F, torch.compiler.disable(function))


@contextmanager
def changeable() -> Iterator[None]:
    """Tensors made within may be changed in place later, in inference mode and out of it."""
    # to leave inference mode turns gradients on
    with torch.inference_mode(False), torch.no_grad():
        yield
