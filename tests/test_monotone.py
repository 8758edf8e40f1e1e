"""Least-squares fits that never decrease."""

from __future__ import annotations

import numpy as np

from clo_calibration.tables import monotone


def test_isotonic_is_the_weighted_least_squares_fit() -> None:
    lines = np.array([[1.0, 3.0, 2.0, 2.0, 5.0]])
    weights = np.array([[1.0, 1.0, 1.0, 2.0, 1.0]])
    np.testing.assert_allclose(monotone.isotonic(lines, weights, 1), [[1.0, 2.25, 2.25, 2.25, 5.0]])


def test_monotone_leaves_a_monotone_grid_alone_and_repairs_another() -> None:
    rising = np.add.outer(np.arange(4.0), np.arange(5.0) ** 2)
    np.testing.assert_allclose(monotone.monotone(rising, np.ones(rising.shape), (0, 1)), rising)
    noisy = rising + np.random.default_rng(0).normal(size=rising.shape)
    smooth = monotone.monotone(noisy, np.ones(rising.shape), (0, 1))
    assert all((np.diff(smooth, axis=axis) >= 0.0).all() for axis in (0, 1))
    assert np.mean((smooth - rising) ** 2) < np.mean((noisy - rising) ** 2)


def test_monotone_leaves_other_axes_as_they_are() -> None:
    noisy = np.random.default_rng(0).normal(size=(4, 5))
    smooth = monotone.monotone(noisy, np.ones(noisy.shape), (1,))
    assert (np.diff(smooth, axis=1) >= 0.0).all()
    for line, wanted in zip(smooth, noisy, strict=True):
        np.testing.assert_allclose(line, monotone.isotonic(wanted[None], np.ones((1, 5)), 1)[0])
