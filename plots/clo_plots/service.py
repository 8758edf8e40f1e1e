"""A service over time: who waits and runs, and the memory they take. Knows nothing about how it was simulated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clo.units import GB
from clo_plots.style import ACCENT, FASTER, INK, SLOWER, SMALL_PT, new_figure

BINS, FINE = 120, 10
"""Bars over the time of a run, and looks into each."""

Samples = Sequence[Sequence[Mapping[str, float]]]


def plot_service(result: Mapping[str, Any]) -> Figure:
    """Requests, GPU memory and host memory of KV against time, a line for each worker; what there is is dashed.

    `result` is what `clo serve-sim --json` prints. Raises `CloError` where it has no samples.
    """
    samples: Samples = [worker for worker in result["samples"] if worker]
    with new_figure(5.2, what="service", empty=not samples) as figure:
        requests, device, host = figure.subplots(3, sharex=True)
        gpus = f"{result['gpus']} x {result['machine']}"
        rate = "all at once" if result["rate_per_s"] is None else f"{result['rate_per_s']:.3g} requests/s"
        requests.set_title(f"{result['design']} on {gpus}: {result['trace']}, {rate}")
        _requests(requests, samples)
        _memory(device, samples, ["device_bytes"], result["room_device_bytes"], "least KV on a GPU (GB)")
        _memory(host, samples, ["host_bytes", "prefix_bytes"], result["room_host_bytes"], "KV on a host (GB)")
        host.set_xlabel("time (s)")
        return figure


def _columns(worker: Sequence[Mapping[str, float]], names: Sequence[str]) -> tuple[Any, Any]:
    return (
        np.array([sample["now_ns"] / 1e9 for sample in worker]),
        np.array([sum(sample[name] for name in names) for sample in worker], dtype=float),
    )


def _requests(axes: Axes, samples: Samples) -> None:
    end = max(worker[-1]["now_ns"] for worker in samples) / 1e9
    grid = np.linspace(0, end, BINS + 1)
    for name, colour in (("running", ACCENT), ("waiting", SLOWER)):
        total = sum(_binned(*_columns(worker, [name]), grid) for worker in samples)
        axes.stairs(total, grid, color=colour, linewidth=1.0, label=name)
    axes.set_ylabel("requests, all GPUs")
    axes.grid(True, axis="y")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=2)


def _binned(times: Any, values: Any, grid: Any) -> Any:
    """The mean of what was the latest sample, over fine steps of each bin."""
    fine = np.linspace(grid[0], grid[-1], FINE * BINS, endpoint=False)
    latest = np.searchsorted(times, fine, side="right") - 1
    return np.where(latest >= 0, values[np.maximum(latest, 0)], 0.0).reshape(BINS, FINE).mean(axis=1)


def _memory(axes: Axes, samples: Samples, names: Sequence[str], room_bytes: float, label: str) -> None:
    """All of it, and what sequences alone take where prefixes are kept beside them."""
    for number, worker in enumerate(samples):
        times, total = _columns(worker, names)
        axes.plot(times, total / GB, color=ACCENT, linewidth=0.7, label="all KV" if number == 0 else None)
        if len(names) > 1:
            _, own = _columns(worker, names[:1])
            axes.plot(times, own / GB, color=FASTER, linewidth=0.7, label="of sequences" if number == 0 else None)
    axes.axhline(room_bytes / GB, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.text(
        1.0, room_bytes / GB, "room", transform=axes.get_yaxis_transform(), ha="right", va="top", fontsize=SMALL_PT
    )
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.08 * room_bytes / GB)
    axes.grid(True, axis="y")
    if len(names) > 1:
        axes.legend(loc="center right")
