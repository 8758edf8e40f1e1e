"""Which implementation of the kernels a device gets: Triton on CUDA, their plain-torch specification elsewhere.

Knows nothing about what they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from clo_kernels import append_kv, gather_pages, hit_test, reference, resolve_pages, score_pages, select_pages
from clo_kernels import sparse_decode_attention as attention

Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of one layer's cache, each as `clo_kernels` specifies it."""

    hit_test: Kernel
    score_pages: Kernel
    select_pages: Kernel
    resolve_pages: Kernel
    gather_pages: Kernel
    sparse_decode_attention: Kernel
    append_kv: Kernel


def kernels_for(device: torch.device) -> Kernels:
    """Triton kernels on CUDA; the references elsewhere, whatever Triton's interpreter is set to."""
    if device.type != "cuda":
        return _of(*[reference] * 7)
    return triton_kernels()


def triton_kernels() -> Kernels:
    """Those of a CUDA device, and of Triton's interpreter."""
    return _of(hit_test, score_pages, select_pages, resolve_pages, gather_pages, attention, append_kv)


def _of(*modules: ModuleType) -> Kernels:
    names = Kernels.__slots__
    return Kernels(*(getattr(module, name) for module, name in zip(modules, names, strict=True)))
