"""The nearest grid that never decreases along chosen axes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.optimize import isotonic_regression

from clo.kernel_tables import Floats

NUM_SWEEPS = 40


def monotone(logs: Floats, weights: Floats, axes: Iterable[int], num_sweeps: int = NUM_SWEEPS) -> Floats:
    """The grid that never decreases along `axes` nearest to `logs` in weighted least squares (Dykstra's method).

    The sweeps converge but do not end exactly, so the last step averages the two exact monotone envelopes.
    """
    current = logs.copy()
    corrections = {axis: np.zeros(logs.shape) for axis in axes}
    for _ in range(num_sweeps):
        for axis, correction in corrections.items():
            wanted = current + correction
            current = isotonic(wanted, weights, axis)
            correction[...] = wanted - current
    return envelope(current, corrections)


def envelope(logs: Floats, axes: Iterable[int]) -> Floats:
    """Mean of the smallest monotone grid above and the largest below: the least worst-case change."""
    upper, lower = logs, logs
    for axis in axes:
        upper = np.maximum.accumulate(upper, axis=axis)
        lower = np.flip(np.minimum.accumulate(np.flip(lower, axis), axis=axis), axis)
    return (upper + lower) / 2.0


def isotonic(logs: Floats, weights: Floats, axis: int) -> Floats:
    """Weighted isotonic regression of every line along `axis`."""
    lines, mass = np.moveaxis(logs, axis, -1), np.moveaxis(weights, axis, -1)
    falling = ~(np.diff(lines, axis=-1) >= 0.0).all(axis=-1)
    out = lines.copy()
    for place in zip(*np.nonzero(falling), strict=True):
        out[place] = isotonic_regression(lines[place], weights=mass[place]).x
    return np.moveaxis(out, -1, axis)
