"""Files are written whole or not at all, and read with errors that name them. Knows nothing about their contents."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clo.errors import CloError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, all else works
    fcntl = None  # type: ignore[assignment]


def check_target(path: Path, *, folder: bool = False) -> None:
    """Whether `path` can be written, before the work that fills it; makes the folder. Raises `CloError` naming it."""
    if path.exists() and path.is_dir() != folder:
        raise CloError(f"{path}: cannot be written: it is {'no' if folder else 'a'} folder")
    if not folder:
        _refuse_special(path)
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        # permission bits do not tell the whole story (root, read-only mounts): try it
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise CloError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder whose files belong together, so that two runs do not mix theirs. Raises `CloError` if it is held.

    The operating system lets go when the process ends, however it ends. Where it cannot lock, nothing is held.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CloError(f"{folder}: another run is writing its results there: give it a folder of its own") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def _refuse_special(path: Path, error: type[CloError] = CloError) -> None:
    if path.exists() and not path.is_file():
        raise error(f"{path}: cannot be written: it is no regular file")


def write_whole(path: Path, write: Callable[[BinaryIO], object], error: type[CloError] = CloError) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place. Raises `error` naming the path.

    A device or pipe is refused, since it would be replaced; of a symbolic link the target is.
    """
    _refuse_special(path, error)
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as problem:
        raise error(f"{path}: cannot be written: {problem.strerror or problem}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as problem:
        raise error(f"{path}: cannot be written: {problem.strerror or problem}") from None
    finally:
        # gone already where it was put in place
        Path(name).unlink(missing_ok=True)


def read_json(path: Path, error: type[CloError] = CloError) -> Any:
    """Parse a JSON file. Raises `error`, one line naming the file, when it is missing, truncated or no text."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: {problem.strerror or problem}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not JSON, or truncated: {problem}") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, data: object) -> None:
    """Write plain data as JSON that people can read too, whole or not at all."""
    write_text(path, json.dumps(data, indent=1))
