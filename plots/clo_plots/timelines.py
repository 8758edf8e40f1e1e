"""A few layers of a decode step on every lane, designs under each other. Knows nothing about how spans came about."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clo.schedule.machine import Lane
from clo.timeline import Span, Timeline
from clo.units import format_seconds
from clo_plots.style import (
    FONT_PT,
    GRID,
    INK,
    PARTS,
    SMALL_PT,
    STALLS,
    UNKNOWN,
    Fill,
    legend_patch,
    new_figure,
    text_width_px,
)
from clo_plots.window import Window, attends, choose_window, visible

# in rows: bars sit a little above the middle, so that layer numbers fit under them
_BAR, _RAISED = 0.54, 0.11


def plot_timelines(
    timelines: Sequence[Timeline], *, start_s: float | None = None, duration_s: float | None = None
) -> Figure:
    """A panel per design, lanes as rows, on one time scale.

    By default three to four layers in the middle of the first timeline's step are shown. The other panels show as much
    time around the same layer, wherever it comes in their own step. With `start_s`, all show the same time of the step.
    """
    rows = [len(timeline.lanes) for timeline in timelines]
    with new_figure(0.75 + sum(0.3 + 0.26 * count for count in rows), what="timeline", empty=not rows) as figure:
        window = choose_window(timelines, start_s=start_s, duration_s=duration_s)
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
        for axes, timeline, zero in zip(panels, timelines, window.zeros_s, strict=True):
            _draw_panel(axes, timeline, window, zero)
        scale, unit = window.unit
        panels[-1].set_xlim(window.begin_s * scale, window.end_s * scale)
        panels[-1].set_xlabel(f"{window.label} ({unit})")
        _legend(figure, timelines, window)
        # only now the panels have their final width
        figure.draw_without_rendering()
        for axes, timeline, zero in zip(panels, timelines, window.zeros_s, strict=True):
            _write_labels(axes, timeline, window, zero)
        return figure


def _draw_panel(axes: Axes, timeline: Timeline, window: Window, zero: float) -> None:
    axes.set_title(f"{timeline.title}: step of {format_seconds(timeline.seconds)}", fontsize=FONT_PT, pad=3)
    axes.set_ylim(len(timeline.lanes) - 0.5, -0.5)
    axes.set_yticks([row - _RAISED for row in range(len(timeline.lanes))], timeline.lanes)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    for row in range(1, len(timeline.lanes)):
        axes.axhline(row - 0.5, color=GRID, linewidth=0.5)
    if any(window.zeros_s):
        axes.axvline(0, color=INK, linewidth=0.7, linestyle=(0, (2, 2)), zorder=3)
    scale, _ = window.unit
    for span in visible(timeline, window, zero):
        row, start = timeline.lanes.index(span.lane), (span.start_s - zero) * scale
        if _stalls(span):
            waited = span.waited_s * scale
            _draw_bar(axes, row, start - waited, waited, STALLS.get(span.cause, UNKNOWN))
        _draw_bar(axes, row, start, (span.end_s - span.start_s) * scale, PARTS.get(span.part, UNKNOWN))


def _stalls(span: Span) -> bool:
    return span.lane == Lane.MAIN and span.waited_s > 0 and bool(span.cause)


def _draw_bar(axes: Axes, row: int, left: float, width: float, fill: Fill) -> None:
    axes.barh(row - _RAISED, width, _BAR, left=left, **fill.patch)


def _write_labels(axes: Axes, timeline: Timeline, window: Window, zero: float) -> None:
    """Causes in stalls and layer numbers under attention, where there is room."""
    for span in visible(timeline, window, zero):
        row = timeline.lanes.index(span.lane)
        if _stalls(span):
            left, fill = span.start_s - span.waited_s - zero, STALLS.get(span.cause, UNKNOWN)
            # in the stall's own colour: a white box would look like a gap
            box = {"boxstyle": "square,pad=0.2", "facecolor": fill.face, "edgecolor": "none"}
            _write(axes, window, span.cause, left, span.start_s - zero, row - _RAISED, box=box, va="center")
        if attends(span):
            left, right = span.start_s - zero, span.end_s - zero
            _write(axes, window, str(span.layer), left, right, row - _RAISED + _BAR / 2, va="top")


def _write(
    axes: Axes, window: Window, text: str, left: float, right: float, row: float, *, va: str, box: object = None
) -> None:
    """Centred in the visible part of the interval, if it is wide enough there."""
    left, right = max(left, window.begin_s), min(right, window.end_s)
    room_px = (right - left) / (window.end_s - window.begin_s) * axes.bbox.width
    if room_px > text_width_px(axes.figure, text, SMALL_PT - 0.5) + 4:
        middle = (left + right) / 2 * window.unit[0]
        axes.text(middle, row, text, ha="center", va=va, fontsize=SMALL_PT - 0.5, bbox=box, clip_on=True)


def _legend(figure: Figure, timelines: Sequence[Timeline], window: Window) -> None:
    spans = [span for one, zero in zip(timelines, window.zeros_s, strict=True) for span in visible(one, window, zero)]
    parts, causes = {span.part for span in spans}, {span.cause for span in spans if _stalls(span)}
    handles = [legend_patch(name, fill) for name, fill in PARTS.items() if name in parts]
    handles += [legend_patch(f"stall: {name}", fill) for name, fill in STALLS.items() if name in causes]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
