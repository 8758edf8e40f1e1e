"""What each choice of a design is worth: TPOT with one field changed. Knows nothing about how it was found."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import PositiveFloat, ValidationError

from clo.errors import CloError
from clo.files import read_json, write_text
from clo.specs.base import Spec, explain


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
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=1))


def load_choices(path: Path) -> Choices:
    """Read what `save` wrote. Raises `CloError` naming the file and the problem."""
    data = read_json(path)
    try:
        return Choices.model_validate(data)
    except ValidationError as error:
        raise CloError(f"{path}: {explain(Choices, error)}") from None
