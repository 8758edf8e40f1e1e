"""Changes of a question: any field of design, machine, model, workload or costs, by its dotted name.

Knows nothing about how a changed question is answered.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from clo import presets
from clo.errors import SpecError
from clo.profile import with_costs
from clo.specs import Design, ModelSpec, ResolveOn, Sync
from clo.specs.overrides import apply
from clo_sim.scene import Scene, gpu_tables, machine_and_costs

ROOTS = ("design", "workload", "machine", "model", "profile")
"""What has fields that can be varied; `machine` and `model` can also be varied as a whole, by name."""

Grid = Mapping[str, Sequence[Any]]
"""Values to try, by dotted field (`design.tau`, `workload.batch`, `machine.link.h2d_bytes_per_s`, `machine`)."""

Changes = tuple[tuple[str, Any], ...]
"""Dotted fields with their values."""

Level = Literal["clock", "simpy", "machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One evaluation: a design, what its scene changes in the question at hand, and the executor."""

    design: Design
    changes: Changes = ()
    level: Level = "clock"

    @property
    def label(self) -> str:
        """The design's name and what else was changed."""
        return " ".join([self.design.name, *(f"{field}={shown(field, value)}" for field, value in self.changes)])


def task_at(base: Design, point: Mapping[str, Any], level: Level = "clock") -> Task:
    """`base` with a point's design fields, in a scene with its other fields. Raises `SpecError` on a contradiction."""
    design = {field.removeprefix("design."): value for field, value in point.items() if field.startswith("design.")}
    others = tuple((field, value) for field, value in point.items() if not field.startswith("design."))
    return Task(design=vary(base, design), changes=others, level=level)


def vary(base: Design, changes: Mapping[str, Any]) -> Design:
    """`base` with some fields changed and a name that says which."""
    if "slot_budgets" in changes:
        changes = {"slot_pages": None, **changes}
    if "budget_fraction" in changes:
        changes = {"budget_pages": None, **changes}
    varied = base.with_fields(**changes, description="")
    named = [(field, getattr(varied, field)) for field in changes if getattr(varied, field) != getattr(base, field)]
    overridden = (("slot_pages", None), ("budget_pages", None))
    texts = [f"{field}={shown(field, value)}" for field, value in named if (field, value) not in overridden]
    return varied.with_fields(name=" ".join([base.name, *texts]))


def shown(field: str, value: Any) -> str:
    """A value as names and tables show it."""
    if field.endswith("slot_budgets") and value is None:
        return "all"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scene_with(scene: Scene, changes: Iterable[tuple[str, Any]]) -> Scene:
    """The scene with fields changed; a machine taken by name brings its own costs. Raises `CloError` on bad fields."""
    by_root: dict[str, dict[tuple[str, ...], Any]] = {}
    for field, value in changes:
        root, *path = field.split(".")
        by_root.setdefault(root, {})[tuple(path)] = value
    for root in ("machine", "model", "workload", "profile"):
        if root in by_root:
            scene = _change(scene, root, by_root[root])
    return scene


def _change(scene: Scene, root: str, changes: dict[tuple[str, ...], Any]) -> Scene:
    fields = {path: value for path, value in changes.items() if path}
    if root == "workload":
        return replace(scene, workload=apply(scene.workload, fields, root))
    if root == "profile":
        return replace(scene, profile=with_costs(gpu_tables(scene.profile, "profile.*"), fields))
    if root == "model":
        model = apply(presets.load_model(str(changes[()])) if () in changes else scene.model, fields, root)
        _check_alike(scene.model, model)
        return replace(scene, model=model)
    machine, costs = machine_and_costs(str(changes[()])) if () in changes else (scene.machine, scene.profile)
    varied = apply(machine, fields, root)
    if varied.profile != machine.profile:
        costs = presets.load_named_profile(varied.profile)
    # costs that were changed by hand stay while they are those of the same machine
    kept = scene.profile if varied.profile == scene.machine.profile else costs
    return replace(scene, machine=varied, profile=kept)


def _check_alike(model: ModelSpec, varied: ModelSpec) -> None:
    """Designs are made for one way to attend: what a model with an indexer chooses is in their fields."""
    one, other = model.indexer, varied.indexer
    if (one is None) != (other is None):
        raise SpecError(
            f"model = {varied.name}: with an indexer, or without, {model.name} is attended to in another way: "
            "explore them in runs of their own"
        )
    if one is not None and other is not None and one.top_tokens != other.top_tokens:
        raise SpecError(
            f"model.indexer.top_tokens = {other.top_tokens}: designs are made for the {one.top_tokens} tokens of "
            f"{model.name}: vary design.budget_pages, or explore them in runs of their own"
        )


def check_field(scene: Scene, field: str, values: Iterable[Any]) -> None:
    """Whether a field exists and takes each value beside some other. Raises `CloError` naming field, value and rule."""
    root, _, rest = field.partition(".")
    if root not in ROOTS or not (rest or root in ("machine", "model")):
        fields = ", ".join(f"{name}.*" for name in ROOTS)
        raise SpecError(f"{field}: nothing that can be varied (choose from {fields}, machine or model)")
    if root == "design" and (rest not in Design.model_fields or rest in ("name", "description")):
        raise SpecError(f"{field}: no choice of a design (fields: clo show designs clo)")
    for value in values:
        if root == "design":
            Design.check_value(rest, value)
        else:
            scene_with(scene, [(field, value)])


@dataclass(frozen=True, slots=True)
class Expansion:
    """A grid written out: its tasks, and why its other combinations make no design, each with how many it keeps out."""

    tasks: tuple[Task, ...]
    contradictions: Mapping[str, int]


def expand(base: Design, grid: Grid) -> Expansion:
    """Every combination of the grid's values on `base`, without contradictions and without twins.

    Where no CPU takes part in a transfer, `host`, `events` and `flags` order the same step: the first stands for all.
    Raises `SpecError` where none is left.
    """
    tasks: dict[tuple[Changes, Design], Task] = {}
    contradictions: Counter[str] = Counter()
    for values in itertools.product(*grid.values()):
        try:
            task = task_at(base, dict(zip(grid, values, strict=True)))
        except SpecError as error:
            contradictions[str(error)] += 1
            continue
        tasks.setdefault(identity(task), task)
    if not tasks:
        reasons = "; ".join(contradictions)
        raise SpecError(f"explore: no combination of {', '.join(grid)} makes a valid design: {reasons}")
    return Expansion(tuple(tasks.values()), dict(contradictions))


def identity(task: Task) -> tuple[Changes, Design]:
    """The same for all tasks whose steps are the same."""
    design = task.design
    alike = design.sync is not Sync.GRAPH and not design.cpu_moves and design.resolve_on is ResolveOn.GPU
    return task.changes, design.with_fields(name="", description="", sync=Sync.EVENTS if alike else design.sync)


def has_field(scene: Scene, field: str) -> bool:
    """Whether the scene, or any design, has this field."""
    root, *path = field.split(".")
    if root == "design":
        return len(path) == 1 and path[0] in Design.model_fields
    data: Any = getattr(scene, root).model_dump() if hasattr(scene, root) else None
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True
