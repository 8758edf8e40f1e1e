"""What all figures share: colours, hatches, sizes, layout helpers and saving. Knows nothing about what is drawn.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; stalls are hatched as well, so that they differ
from work in greyscale print.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from clo.errors import CloError
from clo.files import write_whole
from clo.schedule.machine import Cause, Part

WIDTH_IN = 6.9
"""A single text column."""
DPI = 200
FONT_PT = 8.5
SMALL_PT = 7.5
INK = "#222222"
FAINT = "#9a9a9a"
GRID = "#dddddd"
SLOWER, FASTER, ACCENT = "#D55E00", "#009E73", "#0072B2"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": FONT_PT,
    "axes.titlesize": FONT_PT + 0.5,
    "axes.titlelocation": "left",
    "axes.labelsize": FONT_PT,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": FONT_PT - 0.5,
    "ytick.labelsize": FONT_PT - 0.5,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.fontsize": SMALL_PT,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "clo",
    "pdf.fonttype": 42,
}
"""Applied around drawing and saving; the global settings of matplotlib are left as they are."""


@dataclass(frozen=True, slots=True)
class Fill:
    """How an area looks; a hatched one is drawn in `edge` on `face`."""

    face: str
    edge: str = "none"
    hatch: str = ""

    @property
    def patch(self) -> dict[str, Any]:
        """Keyword arguments of a bar or patch."""
        hatched = {"edgecolor": self.edge, "hatch": self.hatch, "linewidth": 0.0}
        return {"facecolor": self.face, **(hatched if self.hatch else {"linewidth": 0.0})}


PARTS: dict[str, Fill] = {
    Part.MODEL.value: Fill("#0072B2"),
    Part.ATTENTION.value: Fill("#7CC4EE"),
    Part.SELECTION.value: Fill("#F0E442"),
    Part.TRANSFER.value: Fill("#D55E00"),
    Part.RUNTIME.value: Fill("#CC79A7"),
    Part.EXCHANGE.value: Fill("#4B3F8F"),
}
CONTENTION = Fill("#8c8c8c")
STALLS: dict[str, Fill] = {
    Cause.DEMAND.value: Fill("#fdeee3", "#D55E00", "/////"),
    Cause.PREFETCH.value: Fill("#e3f4ee", "#009E73", "\\\\\\\\\\"),
    Cause.HOST_WORK.value: Fill("#f8eaf2", "#B0558A", "xxxxx"),
    Cause.SYNC.value: Fill("#f4f4f4", "#444444", "....."),
    Cause.LAUNCH.value: Fill("#e6f1f8", "#0072B2", "|||||"),
    Cause.ORDER.value: Fill("#f4f4f4", "#7a7a7a", "-----"),
}
UNKNOWN = Fill("#bbbbbb")


def legend_patch(name: str, fill: Fill) -> Patch:
    """A legend's entry for an area."""
    return Patch(label=name, **fill.patch)


@contextmanager
def new_figure(height_in: float, *, what: str, empty: bool) -> Iterator[Figure]:
    """A figure of one text column to be drawn in `STYLE`. Raises `CloError` when there is nothing to draw (`empty`)."""
    if empty:
        raise CloError(f"{what} figure: nothing to draw")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def text_width_px(figure: Figure | SubFigure, text: str, size_pt: float) -> float:
    """How wide `text` is when drawn."""
    probe = figure.text(0, 0, text, fontsize=size_pt)
    width = probe.get_window_extent().width
    probe.remove()
    return float(width)


_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": "clo"},
    "pdf": {"CreationDate": None, "Creator": "clo", "Producer": None},
}


def check_suffix(path: Path) -> str:
    """The file format that the suffix asks for. Raises `CloError` for one that no figure is written in."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _METADATA:
        raise CloError(f"{path}: a figure's suffix must be one of .{', .'.join(_METADATA)}")
    return kind


def save_figure(figure: Figure, path: Path) -> None:
    """Write as PNG, SVG or PDF by the suffix, whole or not at all: the same figure gives the same bytes.

    Raises `CloError` for another suffix, and when the file cannot be written.
    """
    kind = check_suffix(path)
    with matplotlib.rc_context(STYLE):
        write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=DPI, metadata=_METADATA[kind]))
