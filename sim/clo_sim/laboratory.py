"""Evaluates tasks on workers, nothing twice, and keeps all that ended. Knows nothing about which are worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from clo_sim.evaluation import Evaluation, Measure, key_of, measure, question_digest
from clo_sim.record import Record
from clo_sim.variation import Task
from clo_sim.workers import Workers

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
