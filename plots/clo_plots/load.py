"""Latency against load, with the limits of an SLO. Knows nothing about how a fleet was sized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clo.units import format_seconds
from clo_plots.style import ACCENT, INK, SLOWER, SMALL_PT, new_figure


def plot_load(points: Sequence[Mapping[str, Any]], slo: str, rate_per_s: float, *, title: str) -> Figure:
    """One panel for each term of `slo` (`ttft_p95<2s, ...`); `points` are loads as multiples of `rate_per_s`.

    Points beyond a limit are crosses; where a service does not keep up a point is hollow, since its latency depends on
    the length of the run. Raises `CloError` without points.
    """
    terms = [part.strip().split("<") for part in slo.split(",")]
    with new_figure(0.9 + 1.7 * len(terms), what="load", empty=not points) as figure:
        panels = figure.subplots(len(terms), sharex=True, squeeze=False)[:, 0]
        panels[0].set_title(title)
        for axes, (name, limit) in zip(panels, terms, strict=True):
            _panel(axes, points, name, limit, rate_per_s)
        panels[-1].set_xlabel("load (requests/s)")
        return figure


def _panel(axes: Axes, points: Sequence[Mapping[str, Any]], name: str, limit: str, rate_per_s: float) -> None:
    limit_s = seconds_of(limit)
    at = [(point["multiplier"] * rate_per_s, point["values"][name], bool(point["unstable"])) for point in points]
    axes.plot([x for x, _, _ in at], [y for _, y, _ in at], color=ACCENT, linewidth=1.2)
    for x, y, unstable in at:
        over = y >= limit_s
        fill = "none" if unstable else SLOWER if over else ACCENT
        axes.plot(x, y, "X" if over else "o", color=SLOWER if over else ACCENT, markerfacecolor=fill, markersize=5)
    axes.axhline(limit_s, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    text = f"SLO {format_seconds(limit_s)}"
    axes.text(0.0, limit_s, text, transform=axes.get_yaxis_transform(), va="bottom", fontsize=SMALL_PT)
    values = [y for _, y, _ in at]
    if max(values) > 20 * min(values) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(*values, limit_s))
    axes.set_ylabel(f"{name.replace('_', ' ')} (s)")
    axes.grid(True)


def seconds_of(text: str) -> float:
    """`50ms` in seconds, as `format_seconds` writes it."""
    for unit, scale in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * scale
    raise ValueError(f"{text!r}: a time with its unit is expected")
