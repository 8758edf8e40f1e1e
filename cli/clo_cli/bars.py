"""Progress on stderr, for people only: a file or pipe gets nothing. Knows nothing about what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

Tell = Callable[[str, int, int | None], None]
"""Called with a phase, how much of it is done, and of how much; `None` where nobody can say."""


def progress_bar() -> Progress:
    """A bar that goes away when it is done; add tasks to it inside `with`."""
    terminal = Console(stderr=True).is_terminal
    # some versions of rich end a bar that is off with an empty line
    return Progress(console=Console(stderr=True, quiet=not terminal), transient=True, disable=not terminal)


@contextmanager
def phases() -> Iterator[Tell]:
    """One bar for each phase that is told of."""
    with progress_bar() as bar:
        tasks: dict[str, TaskID] = {}

        def tell(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield tell
