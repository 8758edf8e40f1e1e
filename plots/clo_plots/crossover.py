"""When offloading helps: a map over context length and load. Knows nothing about how its cells were simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from clo_plots.style import FASTER, INK, SLOWER, SMALL_PT, new_figure

LEAST, MOST = 0.5, 1.5
"""Ratios beyond these are drawn as these."""
ONLY_RESIDENT = -1.0
_BOUNDARIES: tuple[Any, ...] = ("-", (0, (4, 2)))


def plot_crossover(found: Mapping[str, Any]) -> Figure:
    """Mean E2E of the best offloading design over that of the exact resident one, cell by cell, with crossover lines.

    `found` is the `map` of `clo plan --json`. Lines run between cells where offloading is faster and cells where it is
    not: solid against the first resident design, dashed against the second. Cells in which nothing keeps up are blank.
    """
    rows = found["ratio"][found["residents"][0]]
    with new_figure(4.6, what="crossover", empty=not rows) as figure:
        axes = figure.add_subplot()
        gpus = "one" if _gpus(found) == 1 else _gpus(found)
        percent = f"{100 * found['reused_share']:.0f} %"
        axes.set_title(
            f"Offloading against all on the GPU: {found['model']} on {gpus} {found['machine']}\n"
            f"answers of {found['output_tokens']} tokens, {percent} of a prompt cached"
        )
        image = _cells(axes, rows)
        _names(axes, found, rows)
        styles = zip(found["residents"], _BOUNDARIES, strict=False)
        drawn = [(name, style) for name, style in styles if _boundary(axes, found["ratio"][name], style)]
        _ticks(axes, found)
        bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.8)
        bar.set_label(f"mean E2E: best offloading / {found['residents'][0]}")
        lines: list[Any] = [
            Line2D([], [], color=INK, linestyle=style, label=f"crossover against {name}") for name, style in drawn
        ]
        figure.legend(
            handles=[*lines, Patch(facecolor="white", edgecolor=INK, label="nothing keeps up")],
            loc="outside lower center",
            ncols=3,
            title="in a cell: that ratio (only: just one of the two keeps up), and the best of all designs",
            title_fontsize=SMALL_PT,
        )
        return figure


def _gpus(found: Mapping[str, Any]) -> int:
    """Maps that were saved before GPUs could share a model are of one."""
    return int(found.get("gpus", 1))


def _cells(axes: Axes, rows: Sequence[Sequence[float | None]]) -> Any:
    shown = np.array([[_shown(ratio) for ratio in row] for row in rows])
    colours = LinearSegmentedColormap.from_list("offloading", [FASTER, "#f7f7f7", SLOWER])
    norm = TwoSlopeNorm(1.0, LEAST, MOST)
    return axes.imshow(
        np.ma.masked_invalid(shown), origin="lower", aspect="auto", cmap=colours, norm=norm, interpolation="nearest"
    )


def _shown(ratio: float | None) -> float:
    if ratio is None:
        return math.nan
    return MOST if ratio == ONLY_RESIDENT else min(max(ratio, LEAST), MOST)


def _names(axes: Axes, found: Mapping[str, Any], rows: Sequence[Sequence[float | None]]) -> None:
    """The ratio and the design that is best there."""
    for row, ratios in enumerate(rows):
        for column, ratio in enumerate(ratios):
            if ratio is not None:
                number = "only" if ratio in (0.0, ONLY_RESIDENT) else f"{ratio:.2f}"
                text = f"{number}\n{found['best'][row][column]}"
                axes.text(column, row, text, ha="center", va="center", fontsize=SMALL_PT - 2.5, linespacing=0.95)


def _boundary(axes: Axes, rows: Sequence[Sequence[float | None]], style: Any) -> bool:
    """Edges between neighbouring cells of which offloading is faster in one only; blank cells have none. Whether there
    are any."""
    before = len(axes.lines)

    def faster(row: int, column: int) -> bool | None:
        inside = 0 <= row < len(rows) and 0 <= column < len(rows[0])
        ratio = rows[row][column] if inside else None
        return None if ratio is None else 0 <= ratio < 1

    for row in range(len(rows)):
        for column in range(len(rows[0])):
            here = faster(row, column)
            right, above = faster(row, column + 1), faster(row + 1, column)
            x, y = column + 0.5, row + 0.5
            if here is not None and right is not None and here != right:
                axes.plot([x, x], [row - 0.5, y], color=INK, linestyle=style, linewidth=1.4)
            if here is not None and above is not None and here != above:
                axes.plot([column - 0.5, x], [y, y], color=INK, linestyle=style, linewidth=1.4)
    return len(axes.lines) > before


def _ticks(axes: Axes, found: Mapping[str, Any]) -> None:
    axes.set_xticks(range(len(found["contexts"])), [_tokens(one) for one in found["contexts"]])
    axes.set_yticks(range(len(found["rates_per_s"])), [f"{one:.3g}" for one in found["rates_per_s"]])
    axes.set_xlabel("prompt (tokens)")
    axes.set_ylabel(
        "load (requests/s on one GPU)" if _gpus(found) == 1 else f"load (requests/s on {_gpus(found)} GPUs)"
    )
    axes.tick_params(length=0)
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=INK, linewidth=0.6))


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count / 1000:.0f}k"
