"""A progress bar on stderr, for people only: a file or pipe gets nothing. Knows nothing about what takes long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def progress_bar() -> Progress:
    """A bar that goes away when it is done; add tasks to it inside `with`."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
