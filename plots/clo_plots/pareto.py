"""Time against memory: the designs of a sweep, the named ones, and the front. Knows nothing about how they were run."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clo.units import GB, MS_PER_S
from clo_plots.labels import Points, label_markers
from clo_plots.style import ACCENT, FAINT, FONT_PT, INK, SLOWER, SMALL_PT, new_figure

LEGEND_CHARS = 44
"""Two columns of the legend fit the figure with names of so many characters a line."""

FAR = 2.0
"""A limit so many times above what any design needs is told, not drawn."""

_MARKERS = "osD^vP*Xp<>h"


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignPoint:
    """One design: what it keeps on the device and how long a step takes.

    A named one gets a marker and its name, a finalist (simulated, not only tried on the clock) a marker. One that is
    not `allowed` breaks a bound that was asked for, and has no part in the front. The `best` is ringed, and
    the legend has its name.
    """

    name: str
    kv_device_bytes: float
    tpot_s: float
    named: bool = False
    finalist: bool = False
    allowed: bool = True
    best: bool = False


def pareto_front(points: Iterable[DesignPoint]) -> tuple[DesignPoint, ...]:
    """The designs that none beats in one of memory and time without losing in the other, by rising memory.

    Of designs that are equal in both, the first.
    """
    front: list[DesignPoint] = []
    for point in sorted(points, key=lambda one: (one.kv_device_bytes, one.tpot_s)):
        if not front or point.tpot_s < front[-1].tpot_s:
            front.append(point)
    return tuple(front)


def plot_pareto(points: Sequence[DesignPoint], *, title: str, memory_bytes: float | None = None) -> Figure:
    """TPOT against GPU memory for KV; `memory_bytes`, what there is, is marked by a vertical line unless it is far."""
    with new_figure(3.9, what="pareto", empty=not points) as figure:
        axes = figure.add_subplot(xlabel="GPU memory for KV (GB)", ylabel="TPOT (ms, log scale)")
        if memory_bytes is not None and memory_bytes > FAR * max(point.kv_device_bytes for point in points):
            axes.set_xlabel(f"GPU memory for KV (GB, of {memory_bytes / GB:.0f})")
            memory_bytes = None
        # above the name of the memory line
        axes.set_title(title, pad=6 if memory_bytes is None else 14)
        front = pareto_front([point for point in points if point.allowed] or points)
        named = [point for point in points if point.named]
        _limits(axes, points, memory_bytes)
        line = _draw_front(axes, front)
        swept = [point for point in points if not (point.named or point.finalist)]
        _draw_swept(axes, [point for point in swept if point.allowed])
        _draw_excluded(axes, [point for point in swept if not point.allowed])
        _draw_finalists(axes, [point for point in points if point.finalist and not point.named])
        _draw_named(axes, named)
        _draw_best(axes, [point for point in points if point.best])
        limit = _draw_memory(axes, memory_bytes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        figure.draw_without_rendering()
        others = _positions([point for point in points if not point.named])
        avoid = np.vstack([_dense(axes, line), _dense(axes, limit), others])
        label_markers(axes, [point.name for point in named], _positions(named), avoid, size_pt=FONT_PT)
        return figure


def _positions(points: Sequence[DesignPoint]) -> Points:
    return np.array([(one.kv_device_bytes / GB, one.tpot_s * MS_PER_S) for one in points], float).reshape(-1, 2)


def _limits(axes: Axes, points: Sequence[DesignPoint], memory_bytes: float | None) -> None:
    at = _positions(points)
    right = max(at[:, 0].max(), (memory_bytes or 0.0) / GB)
    margin = max(0.06 * (right - at[:, 0].min()), 0.02 * right, 1e-3)
    low, high = at[:, 1].min(), at[:, 1].max()
    axes.set_yscale("log")
    axes.set_xlim(max(0.0, at[:, 0].min() - margin), right + margin)
    axes.set_ylim(low / max(1.1, (high / low) ** 0.06), high * max(1.1, (high / low) ** 0.06))
    # a narrow range has no round decades to mark
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 6 else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True)


def _draw_front(axes: Axes, front: Sequence[DesignPoint]) -> Points:
    """The least TPOT with at most that much memory: corners of the steps, up to the right edge."""
    at = _positions(front)
    line = np.vstack([[at[0, 0], axes.get_ylim()[1]], at, [axes.get_xlim()[1], at[-1, 1]]])
    axes.step(line[:, 0], line[:, 1], where="post", color=ACCENT, linewidth=1.3, label="best with at most this memory")
    return line


def _dense(axes: Axes, line: Points) -> Points:
    """Points along the steps, a few pixels apart, for labels to keep off."""
    if not len(line):
        return line
    corners = np.repeat(line, 2, axis=0)
    pixels = axes.transData.transform(np.column_stack([corners[1:, 0], corners[:-1, 1]]))
    pieces = [np.linspace(start, end, 60) for start, end in itertools.pairwise(pixels)]
    return np.asarray(axes.transData.inverted().transform(np.vstack(pieces)), float)


def _draw_swept(axes: Axes, swept: Sequence[DesignPoint]) -> None:
    at = _positions(swept)
    if len(at):
        axes.plot(
            at[:, 0],
            at[:, 1],
            "o",
            color=FAINT,
            alpha=0.6,
            markersize=2.8,
            markeredgewidth=0,
            label="swept (on the clock: no contention)",
        )


def _draw_excluded(axes: Axes, excluded: Sequence[DesignPoint]) -> None:
    at = _positions(excluded)
    if len(at):
        style: dict[str, Any] = {"color": FAINT, "markersize": 3.0, "markeredgewidth": 0.6, "markerfacecolor": "none"}
        axes.plot(at[:, 0], at[:, 1], "o", **style, label="swept, breaks a bound asked for")


def _draw_finalists(axes: Axes, finalists: Sequence[DesignPoint]) -> None:
    at = _positions(finalists)
    if len(at):
        style: dict[str, Any] = {
            "color": ACCENT,
            "markersize": 4.5,
            "markeredgecolor": INK,
            "markeredgewidth": 0.5,
            "zorder": 3,
        }
        axes.plot(at[:, 0], at[:, 1], "o", **style, label="finalists (simulated)")


def _draw_named(axes: Axes, named: Sequence[DesignPoint]) -> None:
    for number, (x, y) in enumerate(_positions(named)):
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(x, y, marker, color=SLOWER, markersize=6, markeredgecolor=INK, markeredgewidth=0.6, zorder=4)


def _draw_best(axes: Axes, best: Sequence[DesignPoint]) -> None:
    for point, at in zip(best, _positions(best), strict=True):
        name = textwrap.fill(f"best: {point.name}, {at[1]:.3g} ms", LEGEND_CHARS)
        style: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": ACCENT, "zorder": 5}
        axes.plot(*at, "o", **style, markeredgewidth=1.3, linestyle="none", label=name)


def _draw_memory(axes: Axes, memory_bytes: float | None) -> Points:
    """The line and its name above the axes; its ends."""
    if memory_bytes is None:
        return np.empty((0, 2))
    at = memory_bytes / GB
    axes.axvline(at, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    left, right = axes.get_xlim()
    side = "right" if at > (left + right) / 2 else "left"
    text, above = f"{at:.0f} GB available", axes.get_xaxis_transform()
    axes.text(at, 1.015, text, transform=above, ha=side, va="bottom", fontsize=SMALL_PT)
    return np.column_stack([[at, at], axes.get_ylim()])
