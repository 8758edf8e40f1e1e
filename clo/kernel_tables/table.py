"""A small monotone table of measured GPU kernel times.

A table is a grid of latencies, read by multilinear interpolation in log space, so that it never decreases with an
argument that means more work. Outside the grid it follows the roofline. It knows nothing about where its numbers come
from beyond the labels it carries, nothing about fitting (`clo_calibration.tables` does that), and nothing about what
else runs on the GPU: the kernels were timed alone and repeatedly, so inputs smaller than the L2 cache were read from
that cache.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from clo.specs.base import Spec

Floats = NDArray[np.float64]

LOG_STEP = 5e-4
"""Resolution of a stored log-latency: rounding moves a time by at most 0.025%."""

BYTES_PER_VALUE = 2
"""All tables are for bfloat16, but for narrower weights or caches where a table says so."""


def _ascending(axis: tuple[float, ...]) -> tuple[float, ...]:
    if not axis or axis[0] <= 0.0 or not np.isfinite(axis).all() or (np.diff(axis) <= 0.0).any():
        raise ValueError("must be positive, finite and strictly ascending")
    return axis


Axis = Annotated[tuple[float, ...], AfterValidator(_ascending)]


class _LogGrid:
    """Multilinear interpolation of `log(seconds)` in the logarithms of the arguments, clamped at the edges."""

    def __init__(self, axes: Sequence[Sequence[float]], logs: Floats) -> None:
        self.edges = tuple((axis[0], axis[-1]) for axis in axes)
        self.axes = [np.log(np.asarray(axis, dtype=np.float64)) for axis in axes]
        self.axis_lists = [axis.tolist() for axis in self.axes]
        self.logs = logs
        self.flat = np.ascontiguousarray(logs).reshape(-1)
        self.strides = [stride // logs.itemsize for stride in np.ascontiguousarray(logs).strides]

    def at_point(self, values: Sequence[float]) -> float:
        """Log-seconds at one point; plain Python up to the last 2^d corners, because numpy calls dominate here."""
        cells, weights = [], []
        for value, (first, last), axis in zip(values, self.edges, self.axis_lists, strict=True):
            x = math.log(min(max(value, first), last))
            index = min(max(bisect_right(axis, x) - 1, 0), max(len(axis) - 2, 0))
            cells.append(slice(index, index + 2))
            weights.append((x - axis[index]) / (axis[index + 1] - axis[index]) if len(axis) > 1 else 0.0)
        corner = self.logs[tuple(cells)]
        for weight in weights:
            corner = corner[0] + weight * (corner[1] - corner[0]) if weight else corner[0]
        return float(corner)

    def at_points(self, values: Sequence[Floats]) -> Floats:
        """Log-seconds at broadcast arrays of points."""
        base: NDArray[np.intp] = np.zeros((), dtype=np.intp)
        weights = []
        for value, (first, last), axis, stride in zip(values, self.edges, self.axes, self.strides, strict=True):
            x = np.log(np.clip(value, first, last))
            index = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, max(len(axis) - 2, 0))
            base = base + index * stride
            weights.append((x - axis[index]) / (axis[index + 1] - axis[index]) if len(axis) > 1 else np.zeros(()))
        return self._blend(base, weights, axis=0, offset=0)

    def _blend(self, base: NDArray[np.intp], weights: list[Floats], *, axis: int, offset: int) -> Floats:
        if axis == len(weights):
            return self.flat[offset:].take(base)
        low = self._blend(base, weights, axis=axis + 1, offset=offset)
        if not weights[axis].any():  # on the grid along this axis: half of the corners are not needed
            return low
        high = self._blend(base, weights, axis=axis + 1, offset=offset + self.strides[axis])
        high -= low
        high *= weights[axis]
        high += low
        return high


class KernelTable(Spec):
    """A monotone grid of kernel latencies for one GPU.

    Inside the grid: interpolation in log space. Below it: the first cell (kernels have a latency floor). Above it:
    `floor + (edge - floor) * growth`, where `edge` is the time at the nearest cell, `floor` the smallest time of the
    table, and `growth` the product, over the arguments past their edge, of how much the roofline
    `max(bytes / HBM bandwidth, flops / peak flops)` grows from the edge to the argument with every other argument at
    its largest measured value. Taking the growth there, and not at the cell, is what keeps the table monotone.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ()
    MAY_FALL: ClassVar[tuple[str, ...]] = ()
    """Arguments of which more need not take longer."""

    source: str = "aiconfigurator"
    package_version: str = ""
    framework_version: str = ""
    device: str = ""
    license: str = "Apache-2.0"
    kernels: tuple[str, ...] = Field(default=(), description="kernel names that were timed")
    hbm_bytes_per_s: PositiveFloat = Field(description="datasheet, for extrapolation only")
    flops_per_s: PositiveFloat = Field(description="datasheet, dense bfloat16, for extrapolation only")

    num_samples: NonNegativeInt = Field(default=0, description="measured points behind the grid")
    num_filled: NonNegativeInt = Field(default=0, description="grid cells filled at fit time, not measured")
    num_held_out: NonNegativeInt = Field(default=0, description="measured points kept out of the grid")
    median_abs_relative_error: NonNegativeFloat = Field(default=0.0, description="on the held-out points")
    p90_abs_relative_error: NonNegativeFloat = Field(default=0.0, description="on the held-out points")

    floor_s: PositiveFloat = Field(description="smallest latency of the grid, seconds")
    log_latency: str = Field(repr=False, description="base64 of zlib of steps of LOG_STEP over log(floor_s)")

    @classmethod
    def from_latencies(cls, seconds: ArrayLike, **fields: Any) -> Self:
        """Build from a dense grid of seconds, one axis per argument. Raises `ValueError` where the grid decreases."""
        grid = np.asarray(seconds, dtype=np.float64)
        if not (np.isfinite(grid) & (grid > 0.0)).all():
            raise ValueError("seconds: every latency must be positive and finite")
        floor = float(grid.min())
        steps = np.rint(np.log(grid / floor) / LOG_STEP).astype(np.int64)
        return cls(floor_s=floor, log_latency=_pack(steps), **fields)

    @abstractmethod
    def roofline_seconds(self, *values: Any) -> Any:
        """Datasheet lower bound on the time, in the order of `ARGUMENTS`; warm L2 caches can beat it."""

    @cached_property
    def _grid(self) -> _LogGrid:
        axes = [getattr(self, name) for name in self.ARGUMENTS]
        steps = _unpack(self.log_latency, tuple(len(axis) for axis in axes))
        logs: Floats = math.log(self.floor_s) + LOG_STEP * steps.astype(np.float64)
        return _LogGrid(axes, logs)

    @cached_property
    def _edge(self) -> tuple[tuple[float, ...], float]:
        last = tuple(getattr(self, name)[-1] for name in self.ARGUMENTS)
        return last, float(self.roofline_seconds(*last))

    @model_validator(mode="after")
    def _check_monotone(self) -> Self:
        for axis in self.rising_axes():
            if (np.diff(self._grid.logs, axis=axis) < 0.0).any():
                raise ValueError(f"log_latency: the latency must not decrease with {self.ARGUMENTS[axis]}")
        return self

    @classmethod
    def rising_axes(cls) -> tuple[int, ...]:
        """Places in `ARGUMENTS` of those of which more never take less time."""
        return tuple(axis for axis, name in enumerate(cls.ARGUMENTS) if name not in cls.MAY_FALL)

    def seconds(self, *values: Any, **named: Any) -> Any:
        """Seconds at `values`, one for each of `ARGUMENTS` in that order, or by name: a float for numbers.

        Arrays broadcast. Raises `ValueError` for sizes that are not positive and finite, `TypeError` for others than
        those of this table.
        """
        sizes = self._ordered(values, named)
        if all(isinstance(size, int | float | np.integer | np.floating) for size in sizes):
            _check_positive(self.ARGUMENTS, sizes)
            return self._extrapolate(math.exp(self._grid.at_point(sizes)), sizes)
        arrays = [np.asarray(size, dtype=np.float64) for size in sizes]
        _check_positive(self.ARGUMENTS, arrays)
        seconds = self._extrapolate(np.exp(self._grid.at_points(arrays)), arrays)
        return float(seconds) if np.ndim(seconds) == 0 else seconds

    def _ordered(self, values: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        if named and not values and named.keys() == set(self.ARGUMENTS):
            return tuple(named[name] for name in self.ARGUMENTS)
        if named or len(values) != len(self.ARGUMENTS):
            names = ", ".join(self.ARGUMENTS)
            raise TypeError(f"{type(self).__name__}.seconds: takes {names}, in this order or by name")
        return values

    def _extrapolate(self, seconds: Any, values: Sequence[Any]) -> Any:
        growth: Any = 1.0
        last, edge_s = self._edge
        for axis, (value, edge) in enumerate(zip(values, last, strict=True)):
            if np.any(value > edge) if isinstance(value, np.ndarray) else value > edge:
                moved = (*last[:axis], np.maximum(value, edge), *last[axis + 1 :])
                growth = growth * (self.roofline_seconds(*moved) / edge_s)
        if isinstance(growth, float) and growth == 1.0:
            return seconds
        past = self.floor_s + (seconds - self.floor_s) * growth
        return past if isinstance(past, np.ndarray) else float(past)


def _check_positive(names: Sequence[str], values: Sequence[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        if isinstance(value, np.ndarray):
            good = (value > 0.0) & (value < math.inf)
            if not good.all():
                raise ValueError(f"{name} = {value[~good].flat[0]}: must be positive and finite")
        elif not 0.0 < value < math.inf:
            raise ValueError(f"{name} = {value}: must be positive and finite")


def _pack(steps: NDArray[np.int64]) -> str:
    # differences along the last axis are small, and low and high bytes apart compress better than interleaved
    deltas = np.diff(steps, axis=-1, prepend=0)
    if deltas.min() < 0 or deltas.max() >= 1 << 16:
        raise ValueError("seconds: the latency must not decrease along the last axis, nor span more than e^32")
    planes = deltas.astype("<u2").reshape(-1, 1).view(np.uint8).T.tobytes()
    return base64.b64encode(zlib.compress(planes, 9)).decode("ascii")


def _unpack(text: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
    try:
        planes = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype=np.uint8)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"log_latency: not base64 of zlib data: {error}") from None
    if planes.size != 2 * math.prod(shape):
        raise ValueError(f"log_latency: holds {planes.size} bytes, the axes need {2 * math.prod(shape)}")
    low, high = planes.reshape(2, -1).astype(np.int64)
    return np.cumsum((low + (high << 8)).reshape(shape), axis=-1)
