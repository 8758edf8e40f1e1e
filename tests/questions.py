"""Questions that take milliseconds, for tests of exploration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from commands import run

from clo import presets
from clo_sim.evaluation import Evaluation, evaluate
from clo_sim.scene import Scene
from clo_sim.search import Range
from clo_sim.variation import Task

CLO = presets.load_design("clo")
SPACE = {"design.tau": Range(0.3, 0.95), "design.slot_budgets": [1, 2, 3], "workload.batch": Range(1, 4)}

EXPLORE = (
    "explore",
    "--model",
    "smollm2-135m",
    "--context",
    "4096",
    "--batch",
    "2",
    "--designs",
    "clo",
    "--steps",
    "4",
)


def many(count: int, level: Any = "simpy") -> list[Task]:
    """As many designs that differ."""
    return [Task(design=CLO.with_fields(tau=0.2 + 0.6 * n / count), level=level) for n in range(count)]


def numbers(evaluations: Sequence[Evaluation]) -> list[tuple[float | None, str]]:
    return [(one.tpot_s, one.problem) for one in evaluations]


def inline(scene: Scene) -> Any:
    return lambda tasks: [evaluate(scene, task) for task in tasks]


def explored(*arguments: str) -> Any:
    """What `clo explore` says of the small question, with these options."""
    return json.loads(run(*EXPLORE, *arguments, "--json"))
