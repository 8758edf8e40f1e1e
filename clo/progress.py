"""How work that takes long says how far it is. Knows nothing about who shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

PhaseProgress = Callable[[str, int, int], None]
"""The same of work in phases, with the name of the one that is under way."""


def nobody(*_: object) -> None:
    """Told of progress where nobody asks for it."""
