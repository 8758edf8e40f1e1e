"""What each choice of the best design is worth: TPOT with one of them changed. Knows nothing about how it was found."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

from clo.choices import Alternative, Choices
from clo.units import MS_PER_S, format_seconds
from clo_plots.style import FAINT, FASTER, FONT_PT, GRID, INK, SLOWER, SMALL_PT, new_figure

LINEAR_PERCENT = 10.0
"""Changes up to this are drawn to scale; where some go far beyond, the scale is logarithmic from here on."""
_FAR_PERCENT = 100.0
_LINE_CHARS = 130
_TITLE_CHARS = 55
_TIE = 1e-9


def plot_choices(choices: Choices) -> Figure:
    """A dot per alternative, grouped by field; the field whose change costs or gains most is on top.

    Values of a field that take exactly the same time share a row; what changes nothing is neither slower nor faster.
    """
    rows, not_run = without_ties(ranked(choices)), [one for one in choices.alternatives if one.tpot_s is None]
    small_print = _small_print(not_run)
    what = f"{choices.best_name} ({format_seconds(choices.best_tpot_s)}) with one choice changed"
    title = [*textwrap.wrap(choices.where, _TITLE_CHARS), *textwrap.wrap(what, _TITLE_CHARS)]
    height = 0.8 + 0.15 * len(title) + 0.2 * len(rows) + 0.13 * len(small_print)
    with new_figure(height, what="choices", empty=not rows) as figure:
        axes = figure.add_subplot(title="\n".join(title))
        percents = [change_percent(choices, row) for row in rows]
        _scale(axes, percents)
        _rows(axes, rows)
        for number, (row, percent) in enumerate(zip(rows, percents, strict=True)):
            _draw(axes, number, percent, (row.tpot_s or 0.0) - choices.best_tpot_s)
        if small_print:
            text = "\n".join(small_print)
            figure.supxlabel(text, x=0.01, ha="left", fontsize=SMALL_PT - 0.5, multialignment="left")
        return figure


def change_percent(choices: Choices, alternative: Alternative) -> float:
    """TPOT against the best design's; positive is slower."""
    return 100.0 * ((alternative.tpot_s or 0.0) / choices.best_tpot_s - 1.0)


def ranked(choices: Choices) -> list[Alternative]:
    """Alternatives that run, by field (the one with the largest effect first), the largest effect first in each."""
    effects = {id(one): abs(change_percent(choices, one)) for one in choices.alternatives if one.tpot_s is not None}
    ran = [one for one in choices.alternatives if id(one) in effects]
    largest: dict[str, float] = {}
    for one in ran:
        largest[one.field] = max(largest.get(one.field, 0.0), effects[id(one)])
    return sorted(ran, key=lambda one: (-largest[one.field], one.field, -effects[id(one)]))


def without_ties(rows: Sequence[Alternative]) -> list[Alternative]:
    """Neighbours of one field with the same time as one alternative that names them all."""
    merged: list[Alternative] = []
    for row in rows:
        last = merged[-1] if merged else None
        if last is not None and last.field == row.field and _same(last.tpot_s or 0.0, row.tpot_s or 0.0):
            merged[-1] = last.with_fields(value=f"{last.value}, {row.value}")
        else:
            merged.append(row)
    return merged


def _same(one_s: float, other_s: float) -> bool:
    """Equal but for rounding: the steps are ordered alike, whatever the choice is called."""
    return math.isclose(one_s, other_s, rel_tol=_TIE)


def _scale(axes: Axes, percents: Sequence[float]) -> None:
    low, high = min([0.0, *percents]), max([0.5, *percents])
    label = "change of TPOT (%)"
    if max(high, -low) > _FAR_PERCENT:
        axes.set_xscale("symlog", linthresh=LINEAR_PERCENT, linscale=1.0)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_PERCENT))
        axes.xaxis.set_minor_locator(NullLocator())
        label = f"change of TPOT (%; to scale up to {LINEAR_PERCENT:g} %, logarithmic beyond)"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.set_xlabel(label)
    room = 0.02 * min(high - low, _FAR_PERCENT)
    axes.set_xlim(low * 1.2 - room, high * 1.2 + room)
    axes.grid(True, axis="x")
    axes.axvline(0, color=INK, linewidth=0.8)


def _rows(axes: Axes, rows: Sequence[Alternative]) -> None:
    """Values as tick labels; before them, their field and what the best design has chosen."""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.value for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=FONT_PT - 0.5)
    widest = max(label.get_window_extent().width for label in axes.get_yticklabels())
    offset_pt = widest * 72 / axes.figure.dpi + 5
    axes.tick_params(axis="y", pad=offset_pt)
    for label in axes.get_yticklabels():
        label.set_horizontalalignment("left")
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].field != row.field:
            _head_group(axes, number, f"{row.field}: {row.chosen} \N{RIGHTWARDS ARROW}", offset_pt)


def _head_group(axes: Axes, row: int, text: str, offset_pt: float) -> None:
    if row:
        axes.axhline(row - 0.5, color=GRID, linewidth=0.8)
    axes.annotate(
        text,
        (0.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(-offset_pt - 5, 0.0),
        textcoords="offset points",
        ha="right",
        va="center_baseline",
        fontsize=FONT_PT - 0.5,
    )


def _draw(axes: Axes, row: int, percent: float, seconds: float) -> None:
    tie = abs(percent) < 100.0 * _TIE
    colour, marker = (FAINT, "s") if tie else (SLOWER, "o") if percent > 0 else (FASTER, "D")
    axes.plot([0, percent], [row, row], color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.plot([percent], [row], marker, color=colour, markersize=4.5, markeredgecolor=INK, markeredgewidth=0.4)
    text = "no difference" if tie else f"{_signed(percent)} %  ({_signed(seconds * MS_PER_S)} ms)"
    axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=FONT_PT - 0.5)


def _signed(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:+,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _tick(value: float) -> str:
    text = f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}") if value else "0"


def _small_print(not_run: Sequence[Alternative]) -> list[str]:
    lines = []
    for one in not_run:
        text = f"{one.field} = {one.value} does not run: {' '.join(one.note.split())}".removesuffix(": ")
        lines += textwrap.wrap(text, _LINE_CHARS, subsequent_indent="    ")
    return lines
