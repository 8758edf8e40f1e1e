"""What made a measurement. Knows nothing about what was measured."""

from __future__ import annotations

import platform
from importlib.metadata import version


def package_versions() -> dict[str, str]:
    """Python and the packages that compute."""
    packages = {name: version(name) for name in ("clo-offload", "torch", "transformers", "numpy")}
    # the default text is that of the Python
    return {"python": platform.python_version(), **packages}
