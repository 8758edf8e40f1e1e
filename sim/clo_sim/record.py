"""Evaluations on disk, one JSON line each, written as they end: what a later run need not do again.

Lines are only ever appended, so that a run that is killed loses at most the line it was writing. Knows nothing about
who evaluates.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from clo.errors import CloError
from clo.files import check_target
from clo_sim.evaluation import Evaluation, from_json, to_json

SCHEMA_VERSION = 2
_HEADER = {"what": "clo evaluations", "schema_version": SCHEMA_VERSION}


class Record:
    """The evaluations in a file, by key. One process at a time may hold a file; use it in a `with`.

    Raises `CloError` for a file that is no record, that another run holds, or that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        check_target(path)
        self.path = path
        self._known: dict[str, Evaluation] = {}
        try:
            self._file: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise CloError(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def get(self, key: str) -> Evaluation | None:
        """The evaluation of this key, if there is one."""
        return self._known.get(key)

    def add(self, key: str, evaluation: Evaluation) -> None:
        """Append an evaluation; a key that is there already is left as it is."""
        if key not in self._known:
            self._known[key] = evaluation
            self._append({"key": key, **to_json(evaluation)})

    def __len__(self) -> int:
        return len(self._known)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CloError(f"{self.path}: another run is writing to this record") from None

    def _append(self, data: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(data).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise CloError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def _read(self) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        torn = lines.pop()
        if not lines:
            if torn:
                raise CloError(f"{self.path}: not a record of evaluations")
            self._append(_HEADER)
            return
        self._check_header(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            self._take(number, line)
        # the last line was cut off when its run was killed: that evaluation is done again
        self._file.truncate(sum(len(line) + 1 for line in lines))

    def _check_header(self, line: bytes) -> None:
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("what") != _HEADER["what"]:
            raise CloError(f"{self.path}: not a record of evaluations")
        if header.get("schema_version") != SCHEMA_VERSION:
            raise CloError(
                f"{self.path}: schema_version = {header.get('schema_version')}: this version reads {SCHEMA_VERSION}"
            )

    def _take(self, number: int, line: bytes) -> None:
        try:
            data = json.loads(line)
            self._known[str(data["key"])] = from_json(data)
        except (CloError, ValueError, KeyError, TypeError) as error:
            raise CloError(f"{self.path}: line {number}: not an evaluation: {error}") from None
