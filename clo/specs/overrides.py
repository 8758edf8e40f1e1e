"""`machine.link.h2d_bytes_per_s=50e9`: one field of a specification, set from text. Knows nothing about commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from clo.errors import SpecError
from clo.specs.base import Spec
from clo.specs.design import Design
from clo.specs.machine import MachineSpec
from clo.specs.model import ModelSpec
from clo.specs.workload import Workload

S = TypeVar("S", bound=Spec)

Overrides = Mapping[str, Mapping[tuple[str, ...], Any]]
"""Values by root (`design`, `machine`, ...) and path below it."""


def parse_overrides(settings: Iterable[str], roots: Iterable[str]) -> Overrides:
    """`["design.tau=0.9"]` -> `{"design": {("tau",): 0.9}}`. Raises `SpecError` naming what is wrong."""
    known = tuple(roots)
    result: dict[str, dict[tuple[str, ...], Any]] = {root: {} for root in known}
    for setting in settings:
        path, separator, text = setting.partition("=")
        root, *rest = path.strip().split(".")
        if not separator or not rest or root not in known:
            raise SpecError(f"--set {setting}: {_meant(setting, known)}")
        if tuple(rest) in result[root]:
            raise SpecError(f"--set {setting}: {path.strip()} is set twice")
        result[root][tuple(rest)] = parse_value(text)
    return result


_SPECS: Mapping[str, type[Spec]] = {"design": Design, "machine": MachineSpec, "model": ModelSpec, "workload": Workload}


def _meant(setting: str, roots: Iterable[str]) -> str:
    """What to write instead: the field with its root, if it is one of these."""
    first = setting.strip().replace("=", ".").partition(".")[0]
    near = [root for root in roots if root in _SPECS and first in _SPECS[root].model_fields]
    if near and "=" in setting:
        return f"did you mean {near[0]}.{setting.strip()}?"
    fields = ", ".join(f"{root}.*" for root in roots)
    return f"expected FIELD=VALUE with FIELD one of {fields}"


def parse_value(text: str) -> Any:
    """A JSON value, or the text itself; fields that may be empty read `none` as that."""
    stripped = text.strip()
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return stripped


def apply(spec: S, changes: Mapping[tuple[str, ...], Any], root: str) -> S:
    """A validated copy of `spec` with the changed fields. Unknown fields are named with what is known there."""
    if not changes:
        return spec
    data = spec.model_dump()
    for path, value in changes.items():
        _set(data, path, value, root)
    return type(spec).parse(data)


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any, root: str) -> None:
    for depth, part in enumerate(path):
        if part not in data:
            where = ".".join((root, *path[: depth + 1]))
            raise SpecError(f"{where}: unknown field (known here: {', '.join(data)})")
        if depth == len(path) - 1:
            data[part] = value
        elif isinstance(data[part], dict):
            data = data[part]
        else:
            why = "is none here: give it whole, in a file" if data[part] is None else "has no fields of its own"
            raise SpecError(f"{'.'.join((root, *path))}: {part} {why}")
