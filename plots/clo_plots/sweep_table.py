"""Reads the table of a sweep (Parquet). Knows nothing about drawing it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clo.errors import CloError
from clo_plots.pareto import DesignPoint

_COLUMNS = ("name", "named", "kv_device_bytes", "tpot_s")
# a table may lack these
_MARKS = ("finalist", "allowed", "role")
_NEIGHBOUR = "choice"
"""The role of a design that was run only to price one choice of the winner."""


def load_points(path: Path) -> list[DesignPoint]:
    """The designs of a sweep that could run, without the winner's neighbours; those that were simulated as simulated.

    Raises `CloError` naming the file and the problem.
    """
    columns = _read(path)
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise CloError(f"{path}: not a sweep: has no column {', '.join(missing)}")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    points = [_point(path, row) for row in rows if row.get("role") != _NEIGHBOUR]
    ran = [point for point in points if point is not None]
    simulated = {point.name for point in ran if point.finalist}
    return [point for point in ran if point.finalist or point.named or point.name not in simulated]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file)
            known = [name for name in (*_COLUMNS, *_MARKS) if name in table.schema_arrow.names]
            columns: dict[str, list[Any]] = table.read(columns=known).to_pydict()
            return columns
    except OSError as error:
        raise CloError(f"{path}: {error.strerror or _line(error)}") from None
    except pa.ArrowException as error:
        raise CloError(f"{path}: not Parquet, or truncated: {_line(error)}") from None


def _line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _point(path: Path, row: Mapping[str, Any]) -> DesignPoint | None:
    """A row without a time is a design that could not run; one whose numbers are none is an error."""
    name, tpot_s = row["name"], row["tpot_s"]
    if tpot_s is None or tpot_s != tpot_s:
        return None
    for column in ("kv_device_bytes", "tpot_s"):
        value = row[column]
        if not isinstance(value, float | int) or not 0 < value < math.inf:
            raise CloError(f"{path}: {name}: {column} = {value!r}: must be a number above 0")
    return DesignPoint(
        name=str(name),
        named=bool(row["named"]),
        finalist=bool(row.get("finalist")),
        allowed=row.get("allowed") is not False,
        kv_device_bytes=row["kv_device_bytes"],
        tpot_s=tpot_s,
    )
