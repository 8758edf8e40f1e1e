"""What each choice of a design is worth: one changed at a time, simulated. Knows nothing about finding designs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clo.choices import Alternative, Choices
from clo.errors import SpecError
from clo.results import Result
from clo.specs import Design
from clo_sim.evaluation import Evaluation
from clo_sim.laboratory import Laboratory
from clo_sim.scene import Scene
from clo_sim.variation import Changes, Grid, Task, scene_with, shown, vary
from clo_sim.workers import Workers

ALTERNATIVES: Grid = {
    "selector": ("key_4bit", "page_minmax"),
    "tau": (0.7, 0.8, 0.9),
    "cache": ("none", "lru", "head_reuse"),
    "on_miss": ("replace", "diff"),
    "page_coding": ("none", "int8"),
    "slot_budgets": (1, 1.5, 2, None),
    "prefetch_depth": (0, 1, 2),
    "transfer": ("page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"),
    "sync": ("host", "events", "flags", "graph"),
    "resolve_on": ("gpu", "cpu"),
    "num_ctas": (4, 16, 64),
    "dense_layers": (0, 2, 4),
    "pinned_head_fraction": (0.0, 0.125),
}
"""Single changes that are tried on the best design, one at a time, by the design's field."""

ATTENDED = (
    "selector",
    "page_size",
    "page_coding",
    "budget_fraction",
    "budget_pages",
    "min_budget_pages",
    "num_sink_tokens",
    "recent_window_tokens",
    "dense_layers",
    "pinned_head_fraction",
)
"""What decides which keys and values a sparse design attends to, and with how many bits."""

STALENESS = (
    "cache",
    "tau",
    "target_hit_rate",
    "tau_importance_power",
    "gqa_fold",
    "prefetch_depth",
    "prefetch_query",
)
"""What decides, where a gate lets heads reuse their sets, how old those are."""


def answers_differ_by(base: Design, other: Design) -> tuple[str, ...]:
    """Fields by which two designs attend to different things: time alone does not decide between them."""
    if base.attend is not other.attend:
        return ("attend",)
    if not base.selects:
        return ()
    deciding = (*ATTENDED, *(STALENESS if base.gated or other.gated else ()))
    return tuple(field for field in deciding if getattr(base, field) != getattr(other, field))


def task_differs_by(scene: Scene, base: Design, task: Task) -> tuple[str, ...]:
    """The same of a task, which may change the scene's model too: fewer bits of its keys and values, another one."""
    models = (change for change in task.changes if change[0].partition(".")[0] == "model")
    changed = tuple(change[0] for change in models if scene_with(scene, [change]).model != scene.model)
    return (*answers_differ_by(base, task.design), *changed)


def worth_of_choices(scene: Scene, best: Result, alternatives: Grid = ALTERNATIVES) -> Choices:
    """Change one choice of the best design at a time and simulate."""
    return worth(Laboratory(Workers(scene)), best, (), alternatives)


def worth(laboratory: Laboratory, best: Result, changes: Changes, alternatives: Grid = ALTERNATIVES) -> Choices:
    """The same in a laboratory, of a scene with `changes`."""
    neighbours: list[tuple[dict[str, str], Task | str]] = []
    for field, values in alternatives.items():
        if not _matters(field, best.design):
            continue
        chosen = getattr(best.design, field)
        for value in values:
            if value != chosen:
                row = {"field": field, "chosen": _value_name(field, chosen), "value": _value_name(field, value)}
                neighbours.append((row, _neighbour(best.design, field, value, changes)))
    tasks = [task for _, task in neighbours if isinstance(task, Task)]
    laboratory.expect(len(tasks))
    evaluations = iter(laboratory.run("choice", tasks))
    rows = [
        Alternative(**row, tpot_s=None, note=task) if isinstance(task, str) else _priced(row, best, next(evaluations))
        for row, task in neighbours
    ]
    return Choices(
        best_name=Task(design=best.design, changes=changes).label,
        best_tpot_s=best.tpot_s,
        alternatives=tuple(rows),
        where=f"{best.model} on {best.machine}, {best.workload.label}",
    )


def _matters(field: str, design: Design) -> bool:
    return {"tau": design.gated, "selector": design.selects}.get(field, True)


def _neighbour(design: Design, field: str, value: Any, changes: Changes) -> Task | str:
    try:
        return Task(design=vary(design, {field: value}), changes=changes, level="simpy")
    except SpecError as error:
        return str(error)


def _priced(row: Mapping[str, str], best: Result, other: Evaluation) -> Alternative:
    note = other.problem or _quality_note(row["field"], best, other)
    return Alternative(field=row["field"], chosen=row["chosen"], value=row["value"], tpot_s=other.tpot_s, note=note)


def _quality_note(field: str, best: Result, other: Evaluation) -> str:
    """Whether the alternative also changes what is attended, so that time alone does not decide."""
    if other.result and other.result.memory == best.memory:
        if field == "pinned_head_fraction":
            return "pins as many heads, after rounding"
        if field == "dense_layers":
            return "offloads the same layers"
    if not other.design.selects:
        return ""
    if field in ("dense_layers", "pinned_head_fraction"):
        return "changes the answers: another share of the heads attends in full"
    if field == "selector":
        return "changes the answers: another index chooses the pages"
    if field == "page_coding":
        how = "no longer rounded" if best.design.codes_pages else "rounded to 8 bits; attention to them was not timed"
        return f"changes the answers: keys and values in pages are {how}"
    overlap = other.metrics["overlap"]
    if best.overlap is not None and abs(overlap - best.overlap) > 0.005:
        return f"changes the answers: overlap with a fresh selection {overlap:.0%}, not {best.overlap:.0%}"
    return ""


def _value_name(field: str, value: Any) -> str:
    return "all memory" if field == "slot_budgets" and value is None else shown(field, value)
