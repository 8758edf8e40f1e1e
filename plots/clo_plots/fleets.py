"""Cost against latency: the smallest fleet of every machine and design, and the front. Knows nothing about sizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clo.errors import CloError
from clo_plots.labels import label_markers
from clo_plots.style import ACCENT, FAINT, INK, SLOWER, SMALL_PT, new_figure

_MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class FleetPoint:
    """A fleet: its name, machine type, cost and latency; `span`, where known, is that of the GPUs needed with 90%."""

    name: str
    machine: str
    cost: float
    latency_s: float
    span: tuple[float, float] | None = None


def plot_fleets(fleets: Sequence[Mapping[str, Any]]) -> Figure:
    """Cost per million output tokens (GPUs, where a price is missing) against the SLO's first term.

    `fleets` are those of `clo plan --json`. Fleets on the front, which none beats in one without losing in the other,
    carry their names, with (GPUs that prefill + GPUs that decode) where these differ; a bar is the span of GPUs needed
    with a probability of 90%.
    Raises `CloError` when no fleet meets the SLO.
    """
    able = [one for one in fleets if one["gpus"] is not None]
    if not able:
        raise CloError("fleets figure: no fleet meets the SLO")
    priced = all(one["cost_per_million_output_tokens"] is not None for one in able)
    term = next(iter(able[0]["values"]))
    points = [_point(one, term, priced) for one in able]
    front = fleet_front(points)
    with new_figure(3.8, what="fleets", empty=False) as figure:
        axes = figure.add_subplot(xlabel="$ per million output tokens" if priced else "GPUs", ylabel=f"{term} (s)")
        axes.set_title("Smallest fleet of each machine and design within the SLO")
        machines = list(dict.fromkeys(point.machine for point in points))
        for machine, marker in zip(machines, _MARKERS, strict=False):
            own = [point for point in points if point.machine == machine]
            at = [point.cost for point in own], [point.latency_s for point in own]
            axes.plot(*at, marker, color=FAINT, markersize=6, markeredgecolor=INK, markeredgewidth=0.4, label=machine)
        spans = [(*point.span, point.latency_s) for point in points if point.span is not None]
        for number, (low, high, latency_s) in enumerate(spans):
            label = "needed with 90%" if number == 0 else None
            axes.plot([low, high], [latency_s] * 2, "|-", color=INK, linewidth=0.8, markersize=5, label=label)
        corners = np.array([(point.cost, point.latency_s) for point in front])
        axes.step(corners[:, 0], corners[:, 1], where="post", color=ACCENT, linewidth=1.2, label="front")
        axes.plot(corners[:, 0], corners[:, 1], ".", color=SLOWER, markersize=5)
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(integer=not priced))
        axes.grid(True)
        figure.legend(loc="outside lower center", ncols=5)
        figure.draw_without_rendering()
        others = [(point.cost, point.latency_s) for point in points]
        steps = [(x, y) for (low, y), (high, _) in pairwise(corners) for x in np.linspace(low, high, 40)]
        bars = [(x, y) for low, high, y in spans for x in np.linspace(low, high, 40)]
        taken = np.array([*others, *steps, *bars])
        label_markers(axes, [point.name for point in front], corners, taken, size_pt=SMALL_PT)
        return figure


def fleet_front(points: Sequence[FleetPoint]) -> list[FleetPoint]:
    """The fleets that none beats in one of cost and latency without losing in the other, by rising cost."""
    front: list[FleetPoint] = []
    for point in sorted(points, key=lambda one: (one.cost, one.latency_s)):
        if not front or point.latency_s < front[-1].latency_s:
            front.append(point)
    return front


def _point(fleet: Mapping[str, Any], term: str, priced: bool) -> FleetPoint:
    cost = fleet["cost_per_million_output_tokens"] if priced else fleet["gpus"]
    of_prefill = fleet.get("prefill_gpus", 0)
    count = f"({of_prefill} + {fleet['gpus'] - of_prefill})" if of_prefill else fleet["gpus"]
    name = f"{count} x {fleet['machine']}, {fleet['design']}"
    return FleetPoint(name, fleet["machine"], float(cost), float(fleet["values"][term]), _span(fleet, float(cost)))


def _span(fleet: Mapping[str, Any], cost: float) -> tuple[float, float] | None:
    """As many times the cost as GPUs; none where no number of them may be enough."""
    ends = fleet.get("gpus_interval")
    if ends is None or None in ends:
        return None
    return cost * ends[0] / fleet["gpus"], cost * ends[1] / fleet["gpus"]
