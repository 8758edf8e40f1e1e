"""What a measurement depends on: processor, threads, versions. Knows nothing about what was measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

IDENTITY = ("device", "processor", "cores", "torch_threads")
"""Of a fingerprint, what makes another machine of it; versions may move on."""


def fingerprint(device: torch.device) -> dict[str, str]:
    """This machine as `device` sees it."""
    found = {
        "device": device.type,
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
    }
    if device.type == "cuda":
        found |= {"processor": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return found


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """In what two machines differ, for people; empty for one and the same."""
    return [
        f"{name} is {here.get(name, '?')}, not {there.get(name, '?')}"
        for name in IDENTITY
        if here.get(name) != there.get(name)
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
