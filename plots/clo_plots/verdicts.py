"""Simulated against real decode steps. Knows nothing about how either came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from clo.units import MS_PER_S
from clo_plots.style import ACCENT, FAINT, FONT_PT, INK, SLOWER, new_figure


class Judged(NamedTuple):
    """One run, seconds: real, simulated and its interval; whether costs were fitted at its size."""

    real_s: float
    simulated_s: float
    low_s: float
    high_s: float
    fitted: bool


def plot_verdict(points: Sequence[Judged]) -> Figure:
    """Simulated over real milliseconds with intervals, and 10% on either side of the diagonal."""
    with new_figure(3.6, what="runs", empty=not points) as figure:
        axes = figure.add_subplot(xlabel="real step (ms)", ylabel="simulated step, 90% interval (ms)")
        edge = [min(point.real_s for point in points) * 0.85, max(point.real_s for point in points) * 1.2]
        line = [value * MS_PER_S for value in edge]
        axes.plot(line, line, color=INK, linewidth=0.8, zorder=1)
        axes.fill_between(
            line, [0.9 * v for v in line], [1.1 * v for v in line], color=FAINT, alpha=0.25, linewidth=0, label="± 10%"
        )
        kinds = (
            (True, FAINT, "s", "at sizes that costs were fitted at"),
            (False, ACCENT, "o", "held out: nothing was fitted from these"),
        )
        for fitted, colour, marker, label in kinds:
            chosen = [point for point in points if point.fitted is fitted]
            if not chosen:
                continue
            real = [point.real_s * MS_PER_S for point in chosen]
            simulated = [point.simulated_s * MS_PER_S for point in chosen]
            spread = [
                [max(0.0, point.simulated_s - point.low_s) * MS_PER_S for point in chosen],
                [max(0.0, point.high_s - point.simulated_s) * MS_PER_S for point in chosen],
            ]
            axes.errorbar(
                real, simulated, yerr=spread, fmt=marker, color=colour, markersize=3.5, elinewidth=0.7, label=label
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.tick_params(which="both", length=3, pad=3)  # so that all labels stand in one line
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:.0f}")
            axis.set_minor_formatter("{x:.0f}")
        axes.legend(loc="upper left", frameon=False, fontsize=FONT_PT)
        return figure


def plot_ablation(errors: Mapping[str, float]) -> Figure:
    """Median error of TPOT with a part of the simulator left out, a bar each."""
    with new_figure(0.9 + 0.32 * len(errors), what="parts", empty=not errors) as figure:
        axes = figure.add_subplot(xlabel="median error of TPOT (%)")
        names = list(errors)
        values = [100 * errors[name] for name in names]
        colours = [ACCENT if name == "nothing" else SLOWER for name in names]
        axes.barh(range(len(names)), values, color=colours, height=0.6)
        axes.set_yticks(range(len(names)), [f"without {name}" if name != "nothing" else "complete" for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 1.18 * max(values))
        for row, value in enumerate(values):
            axes.annotate(f" {value:.1f} %", (value, row), va="center", fontsize=FONT_PT)
        return figure
