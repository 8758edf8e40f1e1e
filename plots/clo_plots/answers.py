"""Answers against bytes moved: the change of NLL of each design with its error. Knows nothing about how it is measured.

Designs whose names differ in one setting only, `clo 1x tau=0.8` and `clo 1x tau=0.9`, are joined by a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clo.errors import CloError
from clo_plots.labels import label_markers
from clo_plots.style import ACCENT, FAINT, FASTER, INK, SLOWER, SMALL_PT, new_figure

_COLOURS = (ACCENT, SLOWER, FASTER, "#CC79A7", "#56B4E9", "#E69F00")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One design: bytes moved, as a share of fetching all that is attended; change of NLL and standard error, nats."""

    name: str
    share: float
    delta_nll: float
    delta_nll_se: float

    @property
    def family(self) -> str:
        """The name without the last setting, which joins designs to a line."""
        return self.name.rpartition(" ")[0] if "=" in self.name.rpartition(" ")[2] else self.name

    @property
    def setting(self) -> str:
        """The last setting, or the whole name where there is none."""
        return self.name if self.family == self.name else self.name.rpartition(" ")[2].rpartition("=")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What `clo evaluate` wrote: designs that attend to a part, in order, and where they were measured.

    `still` have moved nothing, which a logarithmic scale has no place for.
    """

    title: str
    points: tuple[Answer, ...]
    still: tuple[str, ...] = ()


def parse_answers(data: Any, *, where: str) -> Answers:
    """From the JSON that `clo evaluate --out` writes. Raises `CloError` naming `where` and the field."""
    try:
        about = data["evaluation"]
        title = f"{about['model']}, {about['context_tokens']} tokens, {about['num_texts']} texts ({about['text']})"
        points = [_answer(row) for row in data["answers"] if row["refetch_bytes_per_step"]]
        moving = tuple(point for point in points if point.share > 0)
    except (KeyError, TypeError, ValueError) as problem:
        raise CloError(f"{where}: not what clo evaluate --out writes: {problem!r}") from None
    if isinstance(about["context_tokens"], list):
        raise CloError(f"{where}: answers at {len(about['context_tokens'])} contexts, a figure shows one")
    return Answers(title=title, points=moving, still=tuple(point.name for point in points if point.share == 0))


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(
        name=str(row["design"]),
        share=float(row["h2d_bytes_per_step"]) / float(row["refetch_bytes_per_step"]),
        delta_nll=float(row["delta_nll"]),
        delta_nll_se=float(row["delta_nll_se"] or 0.0),
    )


def plot_answers(answers: Answers) -> Figure:
    """Change of NLL, with one standard error, against bytes moved."""
    with new_figure(4.1, what="answers", empty=not answers.points) as figure:
        axes = figure.add_subplot(
            xlabel="bytes moved per step, share of fetching all that is attended (log scale)",
            ylabel="change of NLL (nats per token)",
        )
        left_out = f"\nmoved nothing, not shown: {', '.join(answers.still)}" if answers.still else ""
        axes.set_title(f"{answers.title}; against full attention, ± one standard error{left_out}")
        axes.grid(True)
        axes.axhline(0.0, color=INK, linewidth=0.9)
        for number, (family, members) in enumerate(_families(answers.points).items()):
            _draw_family(axes, family, members, _COLOURS[number % len(_COLOURS)])
        _frame(axes, answers.points)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=4)
        figure.draw_without_rendering()
        label_markers(
            axes,
            [point.setting for point in answers.points],
            _at(answers.points),
            np.vstack([_bars(answers.points), _lines(answers.points)]),
            size_pt=SMALL_PT,
        )
        return figure


def _draw_family(axes: Axes, family: str, members: Sequence[Answer], colour: str) -> None:
    at = _at(members)
    errors = [point.delta_nll_se for point in members]
    swept = len(members) > 1
    axes.errorbar(
        at[:, 0],
        at[:, 1],
        yerr=errors,
        fmt="o-" if swept else "s",
        color=colour if swept else INK,
        ecolor=FAINT,
        markersize=4.5,
        linewidth=1.1,
        elinewidth=0.9,
        capsize=2,
        label=f"{family}, by {members[0].name.rpartition(' ')[2].partition('=')[0]}" if swept else None,
    )


def _frame(axes: Axes, points: Sequence[Answer]) -> None:
    at = _at(points)
    axes.set_xscale("log")
    axes.set_xlim(at[:, 0].min() / 1.4, at[:, 0].max() * 1.4)
    axes.tick_params(axis="x", which="both", length=3, pad=3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    digits = "123456789" if at[:, 0].max() < 3 * at[:, 0].min() else "25"
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:.2g}" if f"{value:.0e}"[0] in digits else "")


def _at(points: Sequence[Answer]) -> np.ndarray:
    return np.array([(point.share, point.delta_nll) for point in points], float).reshape(-1, 2)


def _bars(points: Sequence[Answer]) -> np.ndarray:
    """Points along the error bars, for labels to keep off."""
    spots = [
        (point.share, point.delta_nll + part * point.delta_nll_se) for point in points for part in np.linspace(-1, 1, 9)
    ]
    return np.array(spots, float).reshape(-1, 2)


def _lines(points: Sequence[Answer]) -> np.ndarray:
    """Points along the lines between a family's members, straight where shares are drawn on a logarithmic scale."""
    members = (_at(family) for family in _families(points).values())
    pairs = [pair for at in members for pair in pairwise(at)]
    parts = np.linspace(0.0, 1.0, 25)
    spots = [
        (one[0] * (other[0] / one[0]) ** part, one[1] + part * (other[1] - one[1]))
        for one, other in pairs
        for part in parts
    ]
    return np.array(spots, float).reshape(-1, 2)


def _families(points: Sequence[Answer]) -> dict[str, list[Answer]]:
    families: dict[str, list[Answer]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    return families
