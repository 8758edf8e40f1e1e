"""Which device is measured, and with how many threads. Knows nothing about how."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clo.engine.random_weights import need_device


def device_of(name: str) -> torch.device:
    """Raises `SpecError` where there is no such device, or none that steps can be run on."""
    need_device(name)
    return torch.device(name)


@contextmanager
def half_the_cores() -> Iterator[None]:
    """Let an operation use half of the cores: what it runs beside needs the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
