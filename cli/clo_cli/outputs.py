"""What `clo explore` leaves behind: a table of the sweep, timelines, figures. Knows nothing about the sweep itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from clo.errors import CloError
from clo.files import write_json, write_whole

if TYPE_CHECKING:
    from clo.results import Result
    from clo.timeline import Timeline
    from clo_plots import DesignPoint
    from clo_sim.evaluation import Evaluation
    from clo_sim.explore import Exploration
    from clo_sim.laboratory import Finished
    from clo_sim.scene import Scene
    from clo_sim.variation import Changes


def write_sweep(path: Path, scene: Scene, found: Exploration) -> None:
    """Every evaluation as a row of a Parquet table: what it was, every field behind it, metrics, what they rest on."""
    scenes: dict[Changes, dict[str, Any]] = {}
    rows = []
    for finished in found.finished:
        changes = finished[1].task.changes
        if changes not in scenes:
            scenes[changes] = _scene_columns(scene, changes)
        rows.append(_row(finished, found) | _design_columns(finished[1]) | scenes[changes])
    write_whole(path, lambda file: pq.write_table(pa.Table.from_pylist(rows, _schema(rows)), file))


def _row(finished: Finished, found: Exploration) -> dict[str, Any]:
    from clo_sim.evaluation import METRICS

    role, one = finished
    return {
        "name": one.task.label,
        "role": role,
        "named": role == "named",
        "finalist": role == "finalist",
        "executor": one.task.level,
        **{name: one.metrics.get(name) for name in METRICS},
        "allowed": found.goals.allows(one),
        "assumptions": "; ".join(one.assumptions),
        "problem": one.problem,
    }


def _design_columns(one: Evaluation) -> dict[str, Any]:
    return _flat("design", one.design.model_dump(mode="json", exclude={"name", "description"}))


def _scene_columns(scene: Scene, changes: Changes) -> dict[str, Any]:
    """Fields of workload, machine and model, and those costs that were varied."""
    from clo_sim.variation import scene_with

    try:
        varied = scene_with(scene, changes)
    except CloError:
        # values that contradict each other: the row's problem says how
        return dict(changes)
    columns = {"profile": varied.profile.name, "kv_memory_bytes": varied.kv_memory_bytes}
    for root in ("workload", "machine", "model"):
        columns |= _flat(root, getattr(varied, root).model_dump(mode="json"))
    return columns | {field: value for field, value in changes if field.startswith("profile.")}


def _flat(prefix: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{prefix}.{name}"
        flat |= _flat(path, value) if isinstance(value, Mapping) else {path: value}
    return flat


def _schema(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A column for every field that some row has: numbers as float64 where one of them is no whole number."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return pa.schema([(name, _type(values)) for name, values in columns.items()])


def _type(values: Sequence[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.bool_() if kinds else pa.null()
    if kinds <= {int}:
        return pa.int64()
    if kinds == {list}:
        return pa.list_(_type([item for value in values if value is not None for item in value]))
    return pa.float64() if kinds <= {int, float} else pa.string()


def write_results(out: Path, scene: Scene, found: Exploration, figures: bool) -> None:
    """The results of designs and choices as JSON, timelines, and figures if wanted."""
    from clo_sim.variation import scene_with

    best, best_scene = found.best, scene_with(scene, found.winner.task.changes)
    named = [result.model_dump(mode="json") for result in found.named_results]
    write_json(out / "designs.json", {"results": named})
    best.save(out / "best.json")
    if found.choices is not None:
        found.choices.save(out / "choices.json")
    timelines = write_timelines(out / "timeline.json", scene, best_scene, found, best)
    if figures:
        draw_figures(out, scene, found, best, timelines)


def write_timelines(path: Path, scene: Scene, best_scene: Scene, found: Exploration, best: Result) -> list[Timeline]:
    """One simulated step of the best design and of the fastest named design that differs from it."""
    from clo.timeline import save_chrome_trace
    from clo_sim.unfold import simulated_timeline

    chosen = [(best_scene, best), *((scene, rival) for rival in _rival(found.named_results, best))]
    timelines = [
        simulated_timeline(its_scene.priced(its_scene.plan(result.design)), 0, f"{result.design.name} (simulated)")
        for its_scene, result in chosen
    ]
    save_chrome_trace(path, timelines)
    return timelines


def _rival(named: Sequence[Result], best: Result) -> list[Result]:
    others = [result for result in named if result.design.cache is not best.design.cache]
    return sorted(others, key=lambda result: result.tpot_s)[:1]


def draw_figures(out: Path, scene: Scene, found: Exploration, best: Result, timelines: Sequence[Timeline]) -> None:
    """Pareto front, timelines, stalls and choices as PNG."""
    from clo.plan import kv_room
    from clo_plots import plot_choices, plot_pareto, plot_stalls, plot_timelines, save_figure

    varied = {field for one in found.candidates for field, _ in one.task.changes}
    title = f"{scene.model.name} on {scene.machine.label}, {scene.workload.label}"
    title += f", varied: {', '.join(sorted(varied))}" if varied else ""
    elsewhere = any(field.startswith(("machine", "model")) for field in varied)
    room = None if elsewhere else kv_room(scene.model, scene.machine, scene.kv_memory_bytes)
    save_figure(plot_pareto(_points(found), title=title, memory_bytes=room), out / "pareto.png")
    save_figure(plot_timelines(timelines), out / "timeline.png")
    results = {(result.design.name, result.machine): result for result in (*found.named_results, best)}
    save_figure(plot_stalls(list(results.values())), out / "stalls.png")
    if found.choices is not None and any(row.tpot_s is not None for row in found.choices.alternatives):
        save_figure(plot_choices(found.choices), out / "choices.png")


def _points(found: Exploration) -> list[DesignPoint]:
    """Every design once: as it was simulated, where it was."""
    from clo_plots import DesignPoint

    simulated = [one.task for one in (*found.finalists, *found.named) if one.runs]
    asked = {(task.design, task.changes) for task in simulated}
    tried = [one for one in found.candidates if (one.task.design, one.task.changes) not in asked]
    roles = (("candidate", tried), ("finalist", found.finalists), ("named", found.named))
    return [
        DesignPoint(
            name=one.task.label,
            kv_device_bytes=one.metrics["kv_device_bytes"],
            tpot_s=one.metrics["tpot_s"],
            named=role == "named",
            finalist=role == "finalist",
            best=one is found.winner,
            allowed=found.goals.allows(one),
        )
        for role, evaluations in roles
        for one in evaluations
        if one.runs
    ]
