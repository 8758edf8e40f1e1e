"""Versions of packages: what made a measurement, and what a kind of model needs."""

from __future__ import annotations

import platform
from importlib.metadata import version


def package_versions() -> dict[str, str]:
    """Python and the packages that compute."""
    packages = {name: version(name) for name in ("clo-offload", "torch", "transformers", "numpy")}
    # the default text is that of the Python
    return {"python": platform.python_version(), **packages}


def release_of(named: str) -> tuple[int, ...]:
    """The first two numbers of a version: 5.18 of 5.18.0rc1."""
    return tuple(int(part) for part in named.split(".")[:2])
