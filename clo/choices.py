"""What each choice of a design is worth: TPOT with one field changed. Knows nothing about how it was found."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveFloat

from clo.files import read_json, write_json
from clo.specs.base import Spec


class Alternative(Spec):
    """The best design with `field` set to `value` instead; `tpot_s` is none where that cannot run, `note` says why."""

    field: str
    chosen: str
    value: str
    tpot_s: PositiveFloat | None
    note: str = ""


class Choices(Spec):
    """A design and its neighbours, each one change away; `where` is the model, machine and workload, in words."""

    best_name: str
    best_tpot_s: PositiveFloat
    alternatives: tuple[Alternative, ...]
    where: str = ""

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))


def load_choices(path: Path) -> Choices:
    """Read what `save` wrote. Raises `CloError` naming the file and the problem."""
    return Choices.parse(read_json(path), where=str(path))
