"""Completes a grid of measured times: from neighbours along each axis, else scaled along the roofline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clo.kernel_tables import Floats

Bools = NDArray[np.bool_]
Ints = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Log-seconds on a product of axes: NaN where nothing was measured."""

    axes: tuple[Floats, ...]
    logs: Floats

    def where(self, points: Floats) -> tuple[Ints, ...]:
        """Indices of points that lie on the grid."""
        return tuple(np.searchsorted(axis, points[:, column]) for column, axis in enumerate(self.axes))


def make_grid(points: Floats, seconds: Floats, axes: Sequence[Floats] | None = None) -> Grid:
    """Put points on the product of their values (or of `axes`)."""
    chosen = tuple(axes) if axes is not None else tuple(np.unique(column) for column in points.T)
    grid = Grid(axes=chosen, logs=np.full([len(axis) for axis in chosen], np.nan))
    grid.logs[grid.where(points)] = np.log(seconds)
    return grid


def interpolate(grid: Grid) -> Floats:
    """Log-seconds of every cell from its measured neighbours along each axis (itself left out); NaN where none.

    The axes' guesses are averaged with weights `error^-3`, `error` being how far off guesses across as wide a gap are
    along that axis on measured cells: neighbouring head counts say more than neighbouring batch sizes.
    """
    total = np.zeros(grid.logs.shape)
    weight = np.zeros(grid.logs.shape)
    for axis, values in enumerate(grid.axes):
        guess, gap = _between_neighbours(grid.logs, np.log(values), axis)
        known = np.isfinite(guess)
        trust = _typical_error(guess - grid.logs, gap)[known] ** -3.0
        total[known] += trust * guess[known]
        weight[known] += trust
    return np.where(weight > 0.0, total / np.where(weight > 0.0, weight, 1.0), np.nan)


def fill(grid: Grid, guess: Floats, roofline: Callable[..., Any]) -> Floats:
    """Complete a grid: interpolated where possible, else neighbours scaled along the roofline above the floor."""
    logs = np.where(np.isfinite(grid.logs), grid.logs, guess)
    floor = math.exp(float(np.nanmin(grid.logs)))
    bound = roofline(*np.meshgrid(*grid.axes, indexing="ij"))
    while np.isnan(logs).any():
        logs = np.where(np.isfinite(logs), logs, _scaled_neighbours(logs, bound, floor))
    return logs


def _neighbours(known: Bools) -> tuple[Ints, Ints]:
    """Index of the nearest known cell strictly before and after along the last axis (-1 and n where there is none)."""
    size = known.shape[-1]
    index = np.arange(size)
    before = np.full(known.shape, -1)
    before[..., 1:] = np.maximum.accumulate(np.where(known, index, -1), axis=-1)[..., :-1]
    after = np.full(known.shape, size)
    after[..., :-1] = np.minimum.accumulate(np.where(known, index, size)[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    return before, after


def _between_neighbours(logs: Floats, x: Floats, axis: int) -> tuple[Floats, Floats]:
    lines = np.moveaxis(logs, axis, -1)
    before, after = _neighbours(np.isfinite(lines))
    inside = (before >= 0) & (after < len(x))
    left, right = np.maximum(before, 0), np.minimum(after, len(x) - 1)
    gap = np.where(inside, x[right] - x[left], np.inf)
    low, high = np.take_along_axis(lines, left, -1), np.take_along_axis(lines, right, -1)
    guess = np.where(inside, low + (high - low) * (x - x[left]) / gap, np.nan)
    return np.moveaxis(guess, -1, axis), np.moveaxis(gap, -1, axis)


def _typical_error(error: Floats, gap: Floats, num_bins: int = 8) -> Floats:
    """Median absolute error among measured cells whose gap is as wide, for every cell."""
    seen = np.isfinite(error)
    if not seen.any():
        return np.ones(gap.shape)
    edges = np.unique(np.quantile(gap[seen], np.linspace(0.0, 1.0, num_bins + 1)))[1:-1]
    bins = np.searchsorted(edges, gap)
    overall = float(np.median(np.abs(error[seen])))
    medians = [
        float(np.median(np.abs(error[seen & (bins == b)]))) if (seen & (bins == b)).any() else overall
        for b in range(len(edges) + 1)
    ]
    return np.asarray(np.maximum(medians, 1e-4)[bins], dtype=np.float64)


def _scaled_neighbours(logs: Floats, bound: Floats, floor: float) -> Floats:
    total, weight = np.zeros(logs.shape), np.zeros(logs.shape)
    for axis in range(logs.ndim):
        for guess, steps in _from_one_side(logs, bound, floor, axis):
            known = np.isfinite(guess)
            total[known] += guess[known] * steps[known] ** -2.0
            weight[known] += steps[known] ** -2.0
    return np.where(weight > 0.0, total / np.where(weight > 0.0, weight, 1.0), np.nan)


def _from_one_side(logs: Floats, bound: Floats, floor: float, axis: int) -> Iterator[tuple[Floats, Floats]]:
    lines, bounds = np.moveaxis(logs, axis, -1), np.moveaxis(bound, axis, -1)
    size = lines.shape[-1]
    for side in _neighbours(np.isfinite(lines)):
        known, at = (side >= 0) & (side < size), np.clip(side, 0, size - 1)
        above = np.maximum(np.exp(np.take_along_axis(lines, at, -1)) - floor, 0.0)
        guess: Floats = np.log(floor + above * bounds / np.take_along_axis(bounds, at, -1))
        steps = np.abs(np.arange(size) - side).astype(np.float64)
        yield np.moveaxis(np.where(known, guess, np.nan), -1, axis), np.moveaxis(steps, -1, axis)
