"""Sweeps: named designs side by side, a grid of choices around one of them, and what each choice is worth.

The clock sifts the grid, the simulator decides among the best. Knows nothing about files, figures or commands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clo.choices import Alternative, Choices
from clo.errors import CloError, SpecError, TraceError
from clo.results import Result
from clo.specs import Design, ResolveOn, Sync
from clo_sim.clock import step_seconds
from clo_sim.run import simulate
from clo_sim.scene import Scene

Grid = Mapping[str, Sequence[Any]]
"""Values to try, by design field."""

DEFAULT_GRID: Grid = {
    "cache": ("lru", "head_reuse"),
    "slot_budgets": (1, 2, None),
    "prefetch_depth": (0, 1, 2),
    "transfer": ("page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"),
    "sync": ("host", "events", "flags", "graph"),
}
"""Cache policy and size (in budgets; none: all the memory there is), prefetch depth, transfer engine, synchronisation.

What decides the answers' quality (tau, budget, selector, dense layers) stays as the base design has it.
"""

ALTERNATIVES: Grid = {
    "cache": ("none", "lru", "head_reuse"),
    "on_miss": ("replace", "diff"),
    "slot_budgets": (1, 1.5, 2, None),
    "prefetch_depth": (0, 1, 2),
    "transfer": DEFAULT_GRID["transfer"],
    "sync": DEFAULT_GRID["sync"],
    "resolve_on": ("gpu", "cpu"),
    "num_ctas": (4, 16, 64),
    "dense_layers": (0, 2, 4),
    "pinned_head_fraction": (0.0, 0.125),
}
"""Single changes that are tried on the best design, one at a time."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A design that was tried on the clock; `tpot_s` is none where it cannot run, `problem` says why."""

    design: Design
    tpot_s: float | None = None
    kv_device_bytes: float = 0.0
    hit_rate: float = 0.0
    overlap: float = 0.0
    h2d_bytes_per_step: float = 0.0
    slot_pages: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """Named designs (simulated), the grid (on the clock), the best of it (simulated) and what its choices are worth."""

    named: tuple[Result, ...]
    not_run: Mapping[str, str]
    candidates: tuple[Candidate, ...]
    finalists: tuple[Result, ...]
    choices: Choices | None

    @property
    def best(self) -> Result:
        """The fastest of everything simulated. Raises `SpecError` when nothing could run."""
        simulated = (*self.finalists, *self.named)
        if not simulated:
            raise SpecError("explore: no design fits: " + "; ".join(self.not_run.values()))
        return min(simulated, key=lambda result: result.tpot_s)


def expand(base: Design, grid: Grid) -> list[Design]:
    """Every combination of the grid's values on `base`, without contradictions and without twins.

    Where no CPU takes part in a transfer, `host`, `events` and `flags` order the same step: the first stands for all.
    """
    designs: dict[Design, Design] = {}
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        try:
            design = vary(base, changes)
        except SpecError:
            continue
        designs.setdefault(_ordered_as(design), design)
    if not designs:
        raise SpecError(f"explore: no combination of {', '.join(grid)} makes a valid design")
    return list(designs.values())


def _ordered_as(design: Design) -> Design:
    """The same for all designs whose steps are the same."""
    alike = design.sync is not Sync.GRAPH and not design.cpu_moves and design.resolve_on is ResolveOn.GPU
    return design.with_fields(name="", sync=Sync.EVENTS if alike else design.sync)


def vary(base: Design, changes: Mapping[str, Any]) -> Design:
    """`base` with some fields changed and a name that says which."""
    if "slot_budgets" in changes:
        changes = {"slot_pages": None, **changes}
    shown = [_shown(field, value) for field, value in changes.items() if getattr(base, field) != value]
    return base.with_fields(**changes, name=" ".join([base.name, *(text for text in shown if text)]), description="")


def _shown(field: str, value: Any) -> str:
    if field == "slot_pages" and value is None:
        return ""
    return f"{field}={'all' if field == 'slot_budgets' and value is None else value}"


def try_on_clock(scene: Scene, design: Design) -> Candidate:
    """TPOT of `design` without contention, or why it cannot run."""
    try:
        plan = scene.plan(design)
        priced = scene.priced(plan)
    except (SpecError, TraceError) as error:
        return Candidate(design=design, problem=str(error))
    traffic = priced.traffic
    return Candidate(
        design=design,
        tpot_s=float(step_seconds(priced).mean()),
        kv_device_bytes=plan.memory.kv,
        hit_rate=traffic.hit_rate,
        overlap=traffic.overlap,
        h2d_bytes_per_step=float(traffic.fetched_pages.sum(axis=1).mean()) * plan.page_bytes,
        slot_pages=plan.slot_pages,
    )


def sweep(scene: Scene, designs: Iterable[Design], progress: Progress | None = None) -> tuple[Candidate, ...]:
    """Try designs on the clock, in order."""
    todo = list(designs)
    tried = []
    for number, design in enumerate(todo, start=1):
        tried.append(try_on_clock(scene, design))
        if progress is not None:
            progress(number, len(todo))
    return tuple(tried)


def compare(scene: Scene, designs: Iterable[Design]) -> tuple[tuple[Result, ...], dict[str, str]]:
    """Simulate designs; those that cannot run are named with the reason."""
    results, not_run = [], {}
    for design in designs:
        try:
            results.append(simulate(scene, design))
        except (SpecError, TraceError) as error:
            not_run[design.name] = str(error)
    return tuple(results), not_run


def worth_of_choices(scene: Scene, best: Result, alternatives: Grid = ALTERNATIVES) -> Choices:
    """Change one choice of the best design at a time and simulate."""
    rows = []
    for field, values in alternatives.items():
        chosen = getattr(best.design, field)
        for value in values:
            if value != chosen:
                rows.append(_alternative(scene, best, field, chosen, value))
    return Choices(best_name=best.design.name, best_tpot_s=best.tpot_s, alternatives=tuple(rows))


def _alternative(scene: Scene, best: Result, field: str, chosen: Any, value: Any) -> Alternative:
    shown = {"field": field, "chosen": _value_name(field, chosen), "value": _value_name(field, value)}
    try:
        result = simulate(scene, vary(best.design, {field: value}))
    except CloError as error:
        return Alternative(**shown, tpot_s=None, note=str(error))
    return Alternative(**shown, tpot_s=result.tpot_s, note=_quality_note(field, best, result))


def _quality_note(field: str, best: Result, other: Result) -> str:
    """Whether the alternative also changes what is attended, so that time alone does not decide."""
    if field in ("dense_layers", "pinned_head_fraction"):
        return "changes the answers: another share of the heads attends in full"
    if abs(other.overlap - best.overlap) > 0.005:
        return f"changes the answers: overlap with the exact selection {other.overlap:.0%}, not {best.overlap:.0%}"
    return ""


def _value_name(field: str, value: Any) -> str:
    return "all memory" if field == "slot_budgets" and value is None else str(value)


def explore(
    scene: Scene,
    *,
    named: Iterable[Design],
    base: Design,
    grid: Grid = DEFAULT_GRID,
    num_finalists: int = 5,
    progress: Progress | None = None,
) -> Exploration:
    """Compare `named` designs, sweep `grid` around `base`, simulate the best, and price each choice of the winner."""
    designs = expand(base, grid) if grid else []
    results, not_run = compare(scene, named)
    candidates = sweep(scene, designs, progress)
    ranked = sorted((c for c in candidates if c.tpot_s is not None), key=lambda c: c.tpot_s or 0.0)
    finalists, _ = compare(scene, [candidate.design for candidate in ranked[:num_finalists]])
    swept = Exploration(named=results, not_run=not_run, candidates=candidates, finalists=finalists, choices=None)
    if not (finalists or results):
        return swept
    choices = worth_of_choices(scene, swept.best) if grid and swept.best.design.offloads else None
    return Exploration(named=results, not_run=not_run, candidates=candidates, finalists=finalists, choices=choices)
