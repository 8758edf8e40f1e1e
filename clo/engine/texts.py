"""Real texts that are at hand without a network, and which part of one is for tuning and which for reporting.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import ast
import sysconfig
from enum import StrEnum
from pathlib import Path

TUNING_SHARE = 0.4
"""The first part of a text is for choosing settings (the shipped trace is of its first 4,256 tokens), the rest not."""


class Split(StrEnum):
    """Which part of a text is read."""

    TUNE = "tune"
    REPORT = "report"
    ALL = "all"

    def bounds(self, tokens: int) -> tuple[int, int]:
        """First token and the one after the last, of a text of `tokens` tokens."""
        cut = round(TUNING_SHARE * tokens)
        return {Split.TUNE: (0, cut), Split.REPORT: (cut, tokens), Split.ALL: (0, tokens)}[self]


def default_text() -> str:
    """A long English text that every Python carries: the language reference as `pydoc` shows it."""
    import pydoc_data.topics

    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics.values())


def docstrings() -> str:
    """Prose and examples of Python's standard library: the docstrings of its modules, in the order of their files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py"))
    apart = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
    return "\n\n".join(text for path in files if not apart & set(path.parts) for text in _docstrings_of(path))


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, places))
    return [text for text in found if text]


TEXTS = {"topics": default_text, "docstrings": docstrings}
"""By name: the language reference that `pydoc` shows, and the standard library's docstrings, of the running Python."""
