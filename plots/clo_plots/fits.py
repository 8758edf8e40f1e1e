"""Fitted costs of operations over what was timed, and what is left between them. Knows nothing about fitting."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from clo.operation_costs import FitPoint, OperationProfile
from clo.units import US_PER_S
from clo_plots.style import ACCENT, FAINT, GRID, SMALL_PT, new_figure

COLUMNS = 4
LONG = 18
"""Letters of a name that fit above a panel."""
BAND = 0.1
"""Within so much of what was timed a fit is drawn as good."""


def plot_fits(profile: OperationProfile) -> Figure:
    """A panel per operation: fitted over timed microseconds, a point per run, and residuals in percent below."""
    names = sorted(profile.fits, key=lambda name: -_total(profile.fits[name]))
    rows = -(-len(names) // COLUMNS)
    with new_figure(1.7 * rows, what="fits", empty=not names) as figure:
        grid = figure.add_gridspec(2 * rows, COLUMNS, height_ratios=[3, 1] * rows)
        for at, name in enumerate(names):
            row, column = divmod(at, COLUMNS)
            above = figure.add_subplot(grid[2 * row, column])
            _fit(above, name, profile.fits[name])
            _residuals(figure.add_subplot(grid[2 * row + 1, column], sharex=above), profile.fits[name])
        return figure


def _total(points: tuple[FitPoint, ...]) -> float:
    return sum(point.measured_s for point in points)


def _fit(axes: Axes, name: str, points: tuple[FitPoint, ...]) -> None:
    timed = [point.measured_s * US_PER_S for point in points]
    fitted = [point.fitted_s * US_PER_S for point in points]
    low, high = min(timed + fitted) * 0.8, max(timed + fitted) * 1.25
    axes.plot([low, high], [low, high], color=FAINT, linewidth=0.8, zorder=1)
    axes.scatter(timed, fitted, s=7, color=ACCENT, zorder=2)
    axes.set_yscale("log")
    _ticks(axes, timed)
    axes.yaxis.set_major_locator(FixedLocator([min(fitted), max(fitted)]))
    axes.yaxis.set_major_formatter(_microseconds)
    axes.yaxis.set_minor_locator(NullLocator())
    shown = name.replace(":", ":\n", 1) if len(name) > LONG else name
    axes.set_title(f"{shown} (µs)", fontsize=SMALL_PT - 1)
    axes.tick_params(labelbottom=False)


def _ticks(axes: Axes, timed: list[float]) -> None:
    """A log axis with its ends written out: most panels span less than a decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([min(timed), max(timed)]))
    axes.xaxis.set_major_formatter(_microseconds)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=SMALL_PT - 2)


def _microseconds(value: float, _: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _residuals(axes: Axes, points: tuple[FitPoint, ...]) -> None:
    timed = [point.measured_s * US_PER_S for point in points]
    left = [100 * (point.fitted_s / point.measured_s - 1) for point in points if point.measured_s]
    axes.axhspan(-100 * BAND, 100 * BAND, color=GRID, zorder=0)
    axes.scatter(timed[: len(left)], left, s=5, color=ACCENT, zorder=2)
    widest = max(25.0, *(abs(value) for value in left)) if left else 25.0
    axes.set_ylim(-1.1 * widest, 1.1 * widest)
    _ticks(axes, timed)
