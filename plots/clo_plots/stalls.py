"""Where a decode step's time goes, a bar per design. Knows nothing about how a result was obtained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clo.results import Result
from clo.schedule.machine import Part
from clo.units import MS_PER_S
from clo_plots.style import CONTENTION, FONT_PT, INK, PARTS, SMALL_PT, STALLS, UNKNOWN, Fill, legend_patch, new_figure

OFF_SCALE = 5.0
"""Designs that take this many times the median are cut off at the edge, so that the others can be told apart."""
_WORK = (Part.MODEL.value, Part.EXCHANGE.value, Part.ATTENTION.value, Part.SELECTION.value)
_BAR = 0.66


def segments(result: Result) -> list[tuple[str, float, Fill]]:
    """Name, seconds and look of each piece of the step, in drawing order; together they are its TPOT."""
    busy = [(name, result.busy_s[name]) for name in sorted(result.busy_s, key=_work_order)]
    work = [(name, seconds, PARTS.get(name, UNKNOWN)) for name, seconds in busy]
    known = [cause for cause in STALLS if cause in result.stall_s]
    causes = [*known, *(cause for cause in result.stall_s if cause not in STALLS)]
    stalls = [(f"stall: {cause}", result.stall_s[cause], STALLS.get(cause, UNKNOWN)) for cause in causes]
    return [*work, ("contention", result.contention_s, CONTENTION), *stalls]


def plot_stalls(results: Sequence[Result]) -> Figure:
    """Bars of model, attention, selection, contention and stalls by cause, in ms, the fastest design on top."""
    ordered = sorted(results, key=lambda result: result.tpot_s)
    with new_figure(1.35 + 0.3 * len(ordered), what="stalls", empty=not ordered) as figure:
        axes = figure.add_subplot(xlabel="time of a decode step on the main stream (ms)")
        limit = scale_limit_s([result.tpot_s for result in ordered])
        axes.set_xlim(0, limit * MS_PER_S)
        axes.set_ylim(len(ordered) - 0.5, -0.5)
        axes.set_yticks(range(len(ordered)), _names(ordered))
        axes.tick_params(axis="y", length=0, labelsize=FONT_PT)
        axes.grid(True, axis="x")
        for row, result in enumerate(ordered):
            _draw_bar(axes, row, result)
            _write_total(axes, row, result, cut=result.tpot_s > limit)
        _legend(figure, ordered)
        return figure


def _names(results: Sequence[Result]) -> list[str]:
    """Designs, and what they ran on where that differs."""
    if len({result.machine for result in results}) == 1:
        return [result.design.name for result in results]
    return [f"{result.design.name}, {result.machine}" for result in results]


def scale_limit_s(times: Sequence[float]) -> float:
    """End of the time axis: the slowest design that is not off the scale, and a little room."""
    longest = OFF_SCALE * statistics.median_low(times)
    return 1.04 * max(time for time in times if time <= longest)


def _work_order(name: str) -> int:
    return _WORK.index(name) if name in _WORK else len(_WORK)


def _draw_bar(axes: Axes, row: int, result: Result) -> None:
    left = 0.0
    for _, seconds, fill in segments(result):
        axes.barh(row, seconds * MS_PER_S, _BAR, left=left * MS_PER_S, **fill.patch)
        left += seconds


def _write_total(axes: Axes, row: int, result: Result, *, cut: bool) -> None:
    """TPOT in the right margin; a bar that goes on beyond the edge is broken, and says what it mostly is."""
    edge = axes.get_yaxis_transform()
    weight = "bold" if cut else "normal"
    total = f"{_ms(result.tpot_s)} ms"
    axes.text(1.02, row, total, transform=edge, va="center_baseline", fontsize=FONT_PT, fontweight=weight)
    if cut:
        _break(axes, row)
        name, seconds, _ = max(segments(result), key=lambda segment: segment[1])
        share = seconds / result.tpot_s
        note = f"{f'{share:.0%}' if share < 0.995 else '> 99%'} {name}"
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}
        axes.text(0.93, row, note, transform=edge, va="center", ha="right", fontsize=SMALL_PT, bbox=box)


def _ms(seconds: float) -> str:
    value = seconds * MS_PER_S
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _break(axes: Axes, row: int) -> None:
    """A slanted gap near the edge, and an arrow beyond it."""
    edge, end = axes.get_yaxis_transform(), _BAR / 2 + 0.06
    for at, colour, width in ((0.963, INK, 0.8), (0.977, INK, 0.8), (0.970, "white", 4.4)):
        x, y = (at - 0.006, at + 0.006), (row + end, row - end)
        axes.plot(x, y, transform=edge, color=colour, linewidth=width, solid_capstyle="butt")
    axes.plot([1.006], [row], ">", transform=edge, color=INK, markersize=3.5, clip_on=False)


def _legend(figure: Figure, results: Sequence[Result]) -> None:
    """What is long enough to be seen in some bar."""
    seen: dict[str, Fill] = {}
    for result in results:
        seen |= {name: fill for name, seconds, fill in segments(result) if seconds > 2e-3 * result.tpot_s}
    order = [name for name, _, _ in segments(results[0])]
    names = sorted(seen, key=lambda name: order.index(name) if name in order else len(order))
    figure.legend(handles=[legend_patch(name, seen[name]) for name in names], loc="outside lower center", ncols=4)
