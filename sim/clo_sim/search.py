"""Spends a budget of evaluations with Optuna: multi-objective, with bounds, on whatever workers there are.

Designs are asked for in generations of a fixed size and told in the order asked, so that a seed gives the same designs
however many workers there are, and a run that was cut off repeats its questions and finds the answers in its record.
Knows nothing about fields or executors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clo.errors import CloError, SpecError
from clo.specs import Design
from clo_sim.evaluation import Evaluation
from clo_sim.goals import Goals
from clo_sim.variation import Changes, Task, expand, identity, task_at

if TYPE_CHECKING:
    import optuna

GENERATION = 16
"""Designs asked for before any of them is told: enough for as many workers, few enough to learn from."""
MAX_REPEATS = 300
"""So many designs in a row that are known already, or contradict themselves, and the space counts as exhausted."""
_CANNOT_RUN = 10.0
"""Excess told for a design that cannot run: worse than one that breaks a bound by half."""


@dataclass(frozen=True, slots=True)
class Range:
    """All numbers from `low` to `high`, whole ones only if both are; on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise SpecError(f"range {self}: must rise from a number to a larger one")
        if self.log and self.low <= 0:
            raise SpecError(f"range {self}: a logarithmic range must begin above 0")

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{':log' if self.log else ''}"


Space = Mapping[str, Sequence[Any] | Range]
"""Values or ranges by dotted field."""

EvaluateAll = Callable[[Sequence[Task]], list[Evaluation]]
"""Evaluates tasks and returns their evaluations in the same order."""


def check_optimiser(base: Design, space: Space, budget: int) -> None:
    """Whether `search` can go ahead. Raises `CloError` without Optuna, unless all of the space can be tried."""
    if _enumerated(base, space, budget) is None:
        _import_optuna()


def search(
    base: Design, space: Space, budget: int, goals: Goals, evaluate: EvaluateAll, *, seed: int = 0
) -> list[Evaluation]:
    """Up to `budget` evaluations of different designs, in the order in which they were asked for.

    A space of no more designs than that is tried whole. Raises as `check_optimiser`.
    """
    everything = _enumerated(base, space, budget)
    if everything is not None:
        return evaluate(everything)
    study = _Study(base, space, goals, seed)
    evaluations: list[Evaluation] = []
    while len(evaluations) < budget and (asked := study.ask(min(GENERATION, budget - len(evaluations)))):
        fresh = evaluate([task for task, _ in asked])
        study.tell(asked, fresh)
        evaluations += fresh
    return evaluations


def _enumerated(base: Design, space: Space, budget: int) -> tuple[Task, ...] | None:
    grid = {field: values for field, values in space.items() if not isinstance(values, Range)}
    # contradictions and twins make a grid smaller: one of up to some times the budget may still fit it
    if len(grid) < len(space) or math.prod(len(values) for values in grid.values()) > 8 * budget:
        return None
    tasks = expand(base, grid).tasks
    return tasks if len(tasks) <= budget else None


class _Study:
    """An Optuna study in memory over one space; values of a choice are known to it by their place."""

    def __init__(self, base: Design, space: Space, goals: Goals, seed: int) -> None:
        optuna = _import_optuna()
        self._base, self._space, self._goals = base, space, goals
        self._known: dict[tuple[Changes, Design], Evaluation] = {}
        self._distributions = {field: _distribution(optuna, values) for field, values in space.items()}
        self._fail = optuna.trial.TrialState.FAIL
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=GENERATION)
        self._study = optuna.create_study(directions=["minimize"] * len(goals.objectives), sampler=sampler)
        self._random = optuna.samplers.RandomSampler(seed=seed + 1)
        self._sampler = sampler

    def ask(self, count: int) -> list[tuple[Task, optuna.Trial]]:
        """Designs not asked for before; fewer, or none, where the space seems to have no more."""
        asked: dict[tuple[Changes, Design], tuple[Task, optuna.Trial]] = {}
        repeats = 0
        while len(asked) < count and repeats < MAX_REPEATS:
            # what is likely good is soon known: after a repeat look elsewhere
            self._study.sampler = self._random if repeats else self._sampler
            trial = self._study.ask(self._distributions)
            task = self._task(trial.params)
            repeats += 1
            if task is None:
                self._study.tell(trial, state=self._fail)
            elif (known := self._known.get(identity(task))) is not None:
                self._tell_one(trial, known)
            elif identity(task) in asked:
                self._study.tell(trial, state=self._fail)
            else:
                asked[identity(task)] = task, trial
                repeats = 0
        return list(asked.values())

    def tell(self, asked: Iterable[tuple[Task, optuna.Trial]], evaluations: Iterable[Evaluation]) -> None:
        """What came of the designs asked for."""
        for (task, trial), evaluation in zip(asked, evaluations, strict=True):
            self._known[identity(task)] = evaluation
            self._tell_one(trial, evaluation)

    def _tell_one(self, trial: optuna.Trial, one: Evaluation) -> None:
        for number, excess in enumerate(self._excesses(one)):
            trial.set_constraint(f"bound {number}", excess)
        # values of a design that cannot run are never looked at: it breaks a bound by far
        costs = self._goals.costs(one) if one.runs else (0.0,) * len(self._goals.objectives)
        self._study.tell(trial, list(costs))

    def _excesses(self, one: Evaluation) -> Iterator[float]:
        yield 0.0 if one.runs else _CANNOT_RUN
        for bound in self._goals.bounds:
            yield bound.excess(one) if one.runs else _CANNOT_RUN

    def _task(self, params: Mapping[str, Any]) -> Task | None:
        """The task at a point, none where its choices contradict each other."""
        point = {field: _value(self._space[field], params[field]) for field in self._space}
        try:
            return task_at(self._base, point)
        except SpecError:
            return None


def _value(values: Sequence[Any] | Range, param: Any) -> Any:
    return param if isinstance(values, Range) else values[param]


def _distribution(optuna: Any, values: Sequence[Any] | Range) -> Any:
    kinds = optuna.distributions
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(range(len(values)))
    kind = kinds.IntDistribution if values.whole else kinds.FloatDistribution
    return kind(values.low, values.high, log=values.log)


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise CloError('a budget of evaluations needs Optuna: pip install "clo-offload[search]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
