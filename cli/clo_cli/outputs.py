"""What `clo explore` leaves behind: a table of the sweep, timelines, figures. Knows nothing about the sweep itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from clo.files import write_whole

if TYPE_CHECKING:
    from clo.results import Result
    from clo.timeline import Timeline
    from clo_sim.explore import Candidate, Exploration
    from clo_sim.scene import Scene


def write_sweep(path: Path, found: Exploration) -> None:
    """Every candidate and every simulated design as a row of a Parquet table."""
    rows = [_result_row(result, named=True) for result in found.named]
    rows += [_result_row(result, named=False) for result in found.finalists]
    rows += [_candidate_row(candidate) for candidate in found.candidates]
    write_whole(path, lambda file: pq.write_table(pa.Table.from_pylist(rows), file))


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.design.name,
        "named": False,
        "executor": "clock",
        "tpot_s": candidate.tpot_s,
        "kv_device_bytes": candidate.kv_device_bytes,
        "hit_rate": candidate.hit_rate,
        "overlap": candidate.overlap,
        "h2d_bytes_per_step": candidate.h2d_bytes_per_step,
        "slot_pages": candidate.slot_pages,
        "problem": candidate.problem,
        **_design_columns(candidate.design),
    }


def _result_row(result: Result, *, named: bool) -> dict[str, Any]:
    return {
        "name": result.design.name,
        "named": named,
        "executor": result.executor,
        "tpot_s": result.tpot_s,
        "kv_device_bytes": result.kv_device_bytes,
        "hit_rate": result.hit_rate,
        "overlap": result.overlap,
        "h2d_bytes_per_step": result.h2d_bytes_per_step,
        "slot_pages": result.slot_pages,
        "problem": "",
        **_design_columns(result.design),
    }


def _design_columns(design: Any) -> dict[str, Any]:
    fields = design.model_dump(mode="json", exclude={"name", "description"})
    return {f"design.{name}": value for name, value in fields.items()}


def write_timelines(path: Path, scene: Scene, found: Exploration, best: Result) -> list[Timeline]:
    """One simulated step of the best design and of the fastest named design that differs from it."""
    from clo.timeline import save_chrome_trace
    from clo_sim.unfold import simulated_timeline

    chosen = [best, *_rival(found.named, best)]
    timelines = [
        simulated_timeline(scene.priced(scene.plan(result.design)), 0, f"{result.design.name} (simulated)")
        for result in chosen
    ]
    save_chrome_trace(path, timelines)
    return timelines


def _rival(named: Sequence[Result], best: Result) -> list[Result]:
    others = [result for result in named if result.design.cache is not best.design.cache]
    return sorted(others, key=lambda result: result.tpot_s)[:1]


def draw_figures(out: Path, scene: Scene, found: Exploration, best: Result, timelines: Sequence[Timeline]) -> None:
    """Pareto front, timelines, stalls and choices as PNG."""
    from clo_plots import plot_choices, plot_pareto, plot_stalls, plot_timelines, save_figure

    load = scene.workload
    title = f"{scene.model.name} on {scene.machine.name}, {load.batch} x {load.context_tokens} tokens"
    save_figure(plot_pareto(_points(found), title=title, memory_bytes=_kv_room(scene)), out / "pareto.png")
    save_figure(plot_timelines(timelines), out / "timeline.png")
    results = {result.design.name: result for result in (*found.named, best)}
    save_figure(plot_stalls(list(results.values())), out / "stalls.png")
    if found.choices is not None and any(row.tpot_s is not None for row in found.choices.alternatives):
        save_figure(plot_choices(found.choices), out / "choices.png")


def _points(found: Exploration) -> list[Any]:
    from clo_plots import DesignPoint

    points = [
        DesignPoint(name=one.design.name, kv_device_bytes=one.kv_device_bytes, tpot_s=one.tpot_s)
        for one in found.candidates
        if one.tpot_s is not None
    ]
    return points + [
        DesignPoint(name=one.design.name, kv_device_bytes=one.kv_device_bytes, tpot_s=one.tpot_s, named=True)
        for one in found.named
    ]


def _kv_room(scene: Scene) -> float:
    """Device memory that weights and reserve leave for KV, or the cap on it, bytes."""
    free = scene.machine.gpu.memory_bytes - scene.machine.reserve_bytes - scene.model.weight_bytes
    return free if scene.kv_memory_bytes is None else min(free, scene.kv_memory_bytes)
