"""Sweeps: named designs side by side, many variations of one of them, and what each choice is worth.

The clock sifts the variations, the simulator decides among the best, a real machine (where the caller has one) has the
last word. Knows nothing about files, figures or commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from clo.choices import Alternative, Choices
from clo.errors import SpecError
from clo.results import Result
from clo.specs import Design
from clo_sim.evaluation import Evaluation, Measure, key_of, measure, question_digest
from clo_sim.goals import Goals
from clo_sim.record import Record
from clo_sim.scene import Scene
from clo_sim.search import Range, Space, check_optimiser, search
from clo_sim.variation import Changes, Grid, Task, check_field, expand, vary
from clo_sim.workers import Workers

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

ALTERNATIVES: Grid = {
    "selector": ("key_4bit", "page_minmax"),
    "tau": (0.7, 0.8, 0.9),
    "cache": ("none", "lru", "head_reuse"),
    "on_miss": ("replace", "diff"),
    "slot_budgets": (1, 1.5, 2, None),
    "prefetch_depth": (0, 1, 2),
    "transfer": DEFAULT_GRID["design.transfer"],
    "sync": DEFAULT_GRID["design.sync"],
    "resolve_on": ("gpu", "cpu"),
    "num_ctas": (4, 16, 64),
    "dense_layers": (0, 2, 4),
    "pinned_head_fraction": (0.0, 0.125),
}
"""Single changes that are tried on the best design, one at a time, by the design's field."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

Role = Literal["named", "candidate", "finalist", "measured", "choice"]
"""Why a design was evaluated; a choice is the winner with one choice changed."""

Finished = tuple[Role, Evaluation]


class Laboratory:
    """Evaluates tasks on workers, nothing twice, and keeps everything that ended with the role it played."""

    def __init__(self, workers: Workers, record: Record | None = None, progress: Progress | None = None) -> None:
        self._workers, self._record, self._progress = workers, record, progress
        self._question = question_digest(workers.scene)
        self._known: dict[str, Evaluation] = {}
        self._total = 0
        self.finished: list[Finished] = []
        self.recalled = 0

    def expect(self, count: int) -> None:
        """Announce evaluations that `run` will be asked for, for the progress shown."""
        self._total += count

    def run(self, role: Role, tasks: Sequence[Task]) -> list[Evaluation]:
        """The tasks' evaluations, in their order."""
        found: dict[int, Evaluation] = {}
        for number, task in enumerate(tasks):
            known = self._recall(key_of(self._question, task))
            if known is not None:
                # it may have been evaluated under another name
                found[number] = _renamed(known, task)
                self._finish(role, found[number])
        todo = [number for number in range(len(tasks)) if number not in found]
        for place, evaluation in self._workers.run([tasks[number] for number in todo]):
            found[todo[place]] = evaluation
            self._keep(key_of(self._question, evaluation.task), evaluation)
            self._finish(role, evaluation)
        return [found[number] for number in range(len(tasks))]

    def measure(self, tasks: Sequence[Task], run: Measure) -> list[Evaluation]:
        """The tasks on a real machine, one after another."""
        done = []
        for task in tasks:
            done.append(measure(self._workers.scene, task, run))
            self._finish("measured", done[-1])
        return done

    def _recall(self, key: str) -> Evaluation | None:
        if key not in self._known and self._record is not None and (recorded := self._record.get(key)) is not None:
            self._known[key] = recorded
            self.recalled += 1
        return self._known.get(key)

    def _keep(self, key: str, evaluation: Evaluation) -> None:
        self._known[key] = evaluation
        if self._record is not None:
            self._record.add(key, evaluation)

    def _finish(self, role: Role, evaluation: Evaluation) -> None:
        self.finished.append((role, evaluation))
        if self._progress is not None:
            self._progress(len(self.finished), max(self._total, len(self.finished)))


def _renamed(known: Evaluation, task: Task) -> Evaluation:
    result = known.result and known.result.model_copy(update={"design": task.design})
    return Evaluation(
        task=task, metrics=known.metrics, assumptions=known.assumptions, problem=known.problem, result=result
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exploration:
    """Named designs (simulated), candidates (on the clock), the best of those (simulated), and what choices are worth.

    `measured` are finalists on a real machine. Of an `interrupted` one, `finished` holds all there is.
    """

    goals: Goals
    named: tuple[Evaluation, ...] = ()
    candidates: tuple[Evaluation, ...] = ()
    finalists: tuple[Evaluation, ...] = ()
    measured: tuple[Evaluation, ...] = ()
    choices: Choices | None = None
    finished: tuple[Finished, ...] = ()
    recalled: int = 0
    interrupted: bool = False

    @property
    def not_run(self) -> dict[str, str]:
        """Why named designs cannot run."""
        return {one.task.label: one.problem for one in self.named if one.problem}

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
        problems = self.not_run.values() or {one.problem for one in self.candidates[:3]}
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


def worth_of_choices(scene: Scene, best: Result, alternatives: Grid = ALTERNATIVES) -> Choices:
    """Change one choice of the best design at a time and simulate."""
    return _worth(Laboratory(Workers(scene)), best, (), alternatives)


def _worth(laboratory: Laboratory, best: Result, changes: Changes, alternatives: Grid = ALTERNATIVES) -> Choices:
    neighbours: list[tuple[dict[str, str], Task | str]] = []
    for field, values in alternatives.items():
        if field == "tau" and not best.design.gated:
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
        best_name=Task(design=best.design, changes=changes).label, best_tpot_s=best.tpot_s, alternatives=tuple(rows)
    )


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
    if field in ("dense_layers", "pinned_head_fraction"):
        return "changes the answers: another share of the heads attends in full"
    if field == "selector":
        return "changes the answers: another index chooses the pages"
    overlap = other.metrics["overlap"]
    if best.overlap is not None and abs(overlap - best.overlap) > 0.005:
        return f"changes the answers: overlap with a fresh selection {overlap:.0%}, not {best.overlap:.0%}"
    return ""


def _value_name(field: str, value: Any) -> str:
    return "all memory" if field == "slot_budgets" and value is None else str(value)


def check_space(scene: Scene, space: Space) -> None:
    """Whether every field exists and takes its values. Raises `CloError` that names field, value and rule."""
    for field, values in space.items():
        check_field(scene, field, values.ends if isinstance(values, Range) else values)


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
    (Ctrl-C) ends it early, with what there is so far. Raises `CloError` for bad fields and values, before any work.
    """
    goals = goals or Goals()
    check_space(scene, space)
    if budget is None:
        _values_of(space)
    else:
        check_optimiser(base, space, budget)
    laboratory = Laboratory(workers or Workers(scene), record, progress)
    stages = _Stages(laboratory, goals)
    interrupted = False
    try:
        stages.compare(named)
        if space:
            stages.sift(base, space, budget, seed)
            stages.decide(num_finalists, measure)
            stages.price_choices()
    except KeyboardInterrupt:
        interrupted = True
    return stages.exploration(interrupted)


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

    def sift(self, base: Design, space: Space, budget: int | None, seed: int) -> None:
        """Try the space, or as much of it as the budget allows, on the clock."""
        if budget is not None:
            self._laboratory.expect(budget)
            ask = partial(self._laboratory.run, "candidate")
            found = search(base, space, budget, self._goals, ask, seed=seed)
            self._found["candidates"] = tuple(found)
            return
        self._found["candidates"] = self._run("candidate", expand(base, _values_of(space)))

    def decide(self, count: int, run: Measure | None) -> None:
        """Simulate the best candidates, and run them on a machine if there is one."""
        best = self._goals.ranked(self._found["candidates"])[:count]
        self._found["finalists"] = self._run("finalist", [_on(one.task, "simpy") for one in best])
        if run is not None:
            self._found["measured"] = tuple(self._laboratory.measure([_on(one.task, "machine") for one in best], run))

    def price_choices(self) -> None:
        """Change one choice of the winner at a time."""
        found = self.exploration()
        if found.front and found.winner.result is not None and found.best.design.offloads:
            self._found["choices"] = _worth(self._laboratory, found.best_simulated, found.winner.task.changes)

    def _run(self, role: Role, tasks: list[Task]) -> tuple[Evaluation, ...]:
        self._laboratory.expect(len(tasks))
        return tuple(self._laboratory.run(role, tasks))


def _on(task: Task, level: Any) -> Task:
    return Task(design=task.design, changes=task.changes, level=level)


def _values_of(space: Space) -> Grid:
    for field, values in space.items():
        if isinstance(values, Range):
            raise SpecError(f"{field}={values}: a range is searched with a budget of evaluations (--evaluations)")
    return {field: values for field, values in space.items() if not isinstance(values, Range)}
