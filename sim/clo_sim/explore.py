"""Sweeps: named designs side by side, many variations of one of them, and what each choice is worth.

The clock sifts the variations, the simulator decides among the best, a real machine (where the caller has one) has the
last word. Knows nothing about files, figures or commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from clo.choices import Choices
from clo.errors import SpecError
from clo.results import Result
from clo.specs import Design
from clo_sim import intervals
from clo_sim.evaluation import Evaluation, Measure
from clo_sim.goals import Goals
from clo_sim.laboratory import Finished, Laboratory, Progress, Role
from clo_sim.record import Record
from clo_sim.scene import Scene
from clo_sim.search import Range, Space, check_optimiser, search
from clo_sim.variation import Expansion, Grid, Task, check_field, expand, scene_with, vary
from clo_sim.workers import Workers
from clo_sim.worth import worth

DEFAULT_GRID: Grid = {
    "design.cache": ("lru", "head_reuse"),
    "design.slot_budgets": (1, 2, None),
    "design.prefetch_depth": (0, 1, 2),
    "design.transfer": ("page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy"),
    "design.sync": ("host", "events", "flags", "graph"),
}
"""Cache policy and size (in budgets; none: all the memory there is), prefetch depth, transfer engine, synchronisation.

What decides the answers' quality (tau, budget, selector, dense layers) stays as the base design has it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """Named designs (simulated), candidates (on the clock), the best of those (simulated), and what choices are worth.

    `measured` are finalists on a real machine. `contradictions` are why combinations of the space make no design, each
    with how many it keeps out (an optimiser does not count them). Of an `interrupted` one, `finished` is all there is.
    """

    goals: Goals
    named: tuple[Evaluation, ...] = ()
    candidates: tuple[Evaluation, ...] = ()
    finalists: tuple[Evaluation, ...] = ()
    measured: tuple[Evaluation, ...] = ()
    choices: Choices | None = None
    contradictions: Mapping[str, int] = field(default_factory=dict)
    finished: tuple[Finished, ...] = ()
    recalled: int = 0
    interrupted: bool = False

    @property
    def not_run(self) -> dict[str, str]:
        """Why named designs cannot run."""
        return {one.task.label: one.problem for one in self.named if one.problem}

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why named designs cannot run, with the names of those that cannot for the same reason."""
        names: dict[str, list[str]] = {}
        for name, problem in self.not_run.items():
            names.setdefault(problem.removeprefix(f"design {name}: "), []).append(name)
        return names

    @property
    def named_results(self) -> tuple[Result, ...]:
        """Results of the named designs that run."""
        return _results(self.named)

    @property
    def finalist_results(self) -> tuple[Result, ...]:
        """Results of the finalists."""
        return _results(self.finalists)

    @property
    def front(self) -> list[Evaluation]:
        """What was simulated and is best in some trade-off of the objectives, the first objective's best first."""
        ran = tuple(one for one in self.measured if one.runs)
        return self.goals.front(ran or (*self.finalists, *self.named))

    @property
    def winner(self) -> Evaluation:
        """The best by the first objective of everything on the last level. Raises `SpecError` when there is none."""
        front = self.front
        if front:
            return front[0]
        ran = [one for one in (*self.candidates, *self.finalists, *self.named) if one.runs]
        if ran:
            bounds = ", ".join(str(bound) for bound in self.goals.bounds)
            raise SpecError(f"explore: none of the {len(ran)} designs that run keeps {bounds}")
        problems = [f"{', '.join(names)}: {reason}" for reason, names in self.reasons.items()]
        problems = problems or list(dict.fromkeys(one.problem for one in self.candidates[:3]))
        raise SpecError("explore: no design fits: " + "; ".join(problems))

    @property
    def best(self) -> Result:
        """The winner's result. Raises `SpecError` when there is no winner."""
        result = self.winner.result
        if result is None:
            raise SpecError(f"explore: {self.winner.task.label} was not simulated")
        return result

    @property
    def best_simulated(self) -> Result:
        """The winner as the simulator has it. Raises `SpecError` when there is no winner."""
        winner = self.winner
        twins = (one for one in (*self.finalists, *self.named) if _same_question(one.task, winner.task))
        return next((one.result for one in twins if one.result is not None), self.best)


def _same_question(one: Task, other: Task) -> bool:
    return (one.design, one.changes) == (other.design, other.changes)


def _results(evaluations: Iterable[Evaluation]) -> tuple[Result, ...]:
    return tuple(one.result for one in evaluations if one.result is not None)


def sweep(scene: Scene, designs: Iterable[Design], progress: Progress | None = None) -> tuple[Evaluation, ...]:
    """Try designs on the clock, in order."""
    laboratory, tasks = Laboratory(Workers(scene), progress=progress), [Task(design=design) for design in designs]
    laboratory.expect(len(tasks))
    return tuple(laboratory.run("candidate", tasks))


def check_space(scene: Scene, space: Space, base: Design) -> None:
    """Whether every field exists and takes its values. Raises `CloError` that names field, value and rule.

    What contradicts `base` is refused where no other choice is varied that could agree with it.
    """
    tried = {field: values.ends if isinstance(values, Range) else values for field, values in space.items()}
    for name, values in tried.items():
        check_field(scene, name, values)
    choices = [field for field in tried if field.startswith("design.")]
    if len(choices) == 1:
        for value in tried[choices[0]]:
            vary(base, {choices[0].removeprefix("design."): value})


def _check_trace(scene: Scene, designs: Sequence[Design]) -> None:
    """Whether the trace has what is asked of it, as far as any of the designs can be planned.

    What keeps everything on the device or attends to all runs without a trace: with it there is an answer.
    """
    if not all(design.offloads and design.selects for design in designs):
        return
    for design in designs:
        try:
            plan = scene.plan(design)
        except SpecError:
            continue
        scene.source.check(plan)
        return


def explore(
    scene: Scene,
    *,
    named: Iterable[Design],
    base: Design,
    space: Space = DEFAULT_GRID,
    num_finalists: int = 5,
    budget: int | None = None,
    goals: Goals | None = None,
    workers: Workers | None = None,
    record: Record | None = None,
    measure: Measure | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Exploration:
    """Compare `named` designs, try `space` around `base`, simulate the best, and price each choice of the winner.

    Without a `budget` all of the space is tried, else an optimiser spends so many evaluations on it. `workers` must be
    of this `scene` (default: this process). With `measure` the finalists also run on a real machine. An interrupt
    (Ctrl-C) ends it early, with what there is so far. Raises `CloError` for bad fields and values and for a question
    that the trace cannot answer, before any work.
    """
    goals, named = goals or Goals(), tuple(named)
    check_space(scene, space, base)
    if budget is None:
        expansion = expand(base, _values_of(space)) if space else Expansion((), {})
        asked = [task.design for task in expansion.tasks] or named
    else:
        check_optimiser(base, space, budget)
        asked = () if {"design.cache", "design.attend"} & set(space) else (base,)
    if not any(field.startswith(("workload.", "model", "machine")) for field in space):
        _check_trace(scene, asked)
    laboratory = Laboratory(workers or Workers(scene), record, progress)
    stages = _Stages(laboratory, goals)
    interrupted = False
    try:
        stages.compare(named)
        if space:
            if budget is None:
                stages.try_all(expansion)
            else:
                stages.search(base, space, budget, seed)
            stages.decide(num_finalists, measure)
            stages.price_choices()
    except KeyboardInterrupt:
        interrupted = True
    return stages.exploration(interrupted)


def with_intervals(found: Exploration, scene: Scene, progress: Progress | None = None) -> Exploration:
    """The same with 90% prediction intervals on every simulated result, named or finalist; `scene` is explored."""
    total = len(found.named_results) + len(found.finalist_results)
    done = count(1)

    def told(one: Evaluation) -> Evaluation:
        if one.result is None:
            return one
        varied = scene_with(scene, one.task.changes)
        result = intervals.with_intervals(one.result, varied.priced(varied.plan(one.design)))
        if progress is not None:
            progress(next(done), total)
        return replace(one, result=result)

    return replace(found, named=tuple(map(told, found.named)), finalists=tuple(map(told, found.finalists)))


class _Stages:
    """What is known after each stage of an exploration."""

    def __init__(self, laboratory: Laboratory, goals: Goals) -> None:
        self._laboratory, self._goals = laboratory, goals
        self._found: dict[str, Any] = {}

    def exploration(self, interrupted: bool = False) -> Exploration:
        """What there is so far."""
        laboratory = self._laboratory
        return Exploration(
            goals=self._goals,
            finished=tuple(laboratory.finished),
            recalled=laboratory.recalled,
            interrupted=interrupted,
            **self._found,
        )

    def compare(self, named: Iterable[Design]) -> None:
        """Simulate the named designs."""
        self._found["named"] = self._run("named", [Task(design=design, level="simpy") for design in named])

    def try_all(self, expansion: Expansion) -> None:
        """Try these on the clock."""
        self._found["contradictions"] = expansion.contradictions
        self._found["candidates"] = self._run("candidate", expansion.tasks)

    def search(self, base: Design, space: Space, budget: int, seed: int) -> None:
        """Try as much of the space as the budget allows on the clock, the next where the last were good."""
        self._laboratory.expect(budget)
        ask = partial(self._laboratory.run, "candidate")
        self._found["candidates"] = tuple(search(base, space, budget, self._goals, ask, seed=seed))

    def decide(self, num_finalists: int, run: Measure | None) -> None:
        """Simulate the best candidates, and run them on a machine if there is one."""
        best = self._goals.ranked(self._found["candidates"])[:num_finalists]
        self._found["finalists"] = self._run("finalist", [_on(one.task, "simpy") for one in best])
        if run is not None:
            self._found["measured"] = tuple(self._laboratory.measure([_on(one.task, "machine") for one in best], run))

    def price_choices(self) -> None:
        """Change one choice of the winner at a time."""
        found = self.exploration()
        if found.front and found.winner.result is not None and found.best.design.offloads:
            self._found["choices"] = worth(self._laboratory, found.best_simulated, found.winner.task.changes)

    def _run(self, role: Role, tasks: Sequence[Task]) -> tuple[Evaluation, ...]:
        self._laboratory.expect(len(tasks))
        return tuple(self._laboratory.run(role, tasks))


def _on(task: Task, level: Any) -> Task:
    return Task(design=task.design, changes=task.changes, level=level)


def _values_of(space: Space) -> Grid:
    for name, values in space.items():
        if isinstance(values, Range):
            raise SpecError(f"{name}={values}: a range is searched with a budget of evaluations (--evaluations)")
    return {name: values for name, values in space.items() if not isinstance(values, Range)}
