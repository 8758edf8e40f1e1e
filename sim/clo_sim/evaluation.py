"""One evaluation: a task on the clock or the simulator, and what came out of it, as numbers that can be compared.

Knows nothing about which tasks are worth it, nor where they run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clo.errors import CloError, SpecError
from clo.results import Result
from clo.specs import Design
from clo_sim.assumptions import assumptions_of
from clo_sim.clock import step_seconds
from clo_sim.run import measured_share, simulate, source_shares
from clo_sim.scene import Scene
from clo_sim.variation import Changes, Level, Task, scene_with

METRICS = (
    "tpot_s",
    "tpot_p99_s",
    "tokens_per_s",
    "gpu_tokens_per_s",
    "overlap",
    "hit_rate",
    "reuse_rate",
    "h2d_bytes_per_step",
    "device_bytes",
    "kv_device_bytes",
    "host_bytes",
    "slot_pages",
    "measured_share",
)
"""What every executor reports of a design: see docs/metrics.md."""

Measure = Callable[[Scene, Design], Result]
"""Runs a design on a real machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a task came to: metrics, or in `problem` why it cannot run. `result` has the details of a simulation."""

    task: Task
    metrics: Mapping[str, float] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    problem: str = ""
    result: Result | None = None

    @property
    def runs(self) -> bool:
        """Whether the design fits and was run."""
        return not self.problem

    @property
    def design(self) -> Design:
        """The design that was tried."""
        return self.task.design

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a decode step; none where it cannot run."""
        return self.metrics.get("tpot_s")


def evaluate(scene: Scene, task: Task) -> Evaluation:
    """Run a task on its executor; a design that does not fit the scene is an evaluation with a problem, no error."""
    if task.level == "machine":
        raise SpecError("level = machine: no real machine is known here: give `measure`")
    try:
        varied = scene_with(scene, task.changes)
        if task.level == "simpy":
            return from_result(task, simulate(varied, task.design))
        return _on_clock(varied, task)
    except CloError as error:
        return Evaluation(task=task, problem=str(error))


def measure(scene: Scene, task: Task, run: Measure) -> Evaluation:
    """Run a task on a real machine."""
    try:
        return from_result(task, run(scene_with(scene, task.changes), task.design))
    except CloError as error:
        return Evaluation(task=task, problem=str(error))


def from_result(task: Task, result: Result) -> Evaluation:
    """A result as an evaluation."""
    values = {name: getattr(result, name) for name in METRICS}
    # a machine does not say what a fresh selection would have chosen
    metrics = {name: float("nan") if value is None else float(value) for name, value in values.items()}
    return Evaluation(task=task, metrics=metrics, assumptions=result.assumptions, result=result)


def _on_clock(scene: Scene, task: Task) -> Evaluation:
    """The metrics without contention: the same as of `simulate(..., executor="clock")`, in half the time."""
    plan = scene.plan(task.design)
    priced = scene.priced(plan)
    seconds, traffic = step_seconds(priced), priced.traffic
    tpot = float(seconds.mean())
    metrics = {
        "tpot_s": tpot,
        "tpot_p99_s": float(np.percentile(seconds, 99)),
        "tokens_per_s": plan.workload.batch / tpot,
        "gpu_tokens_per_s": plan.workload.batch / tpot / plan.machine.tensor_parallel,
        "overlap": traffic.overlap,
        "hit_rate": traffic.hit_rate,
        "reuse_rate": traffic.reuse_rate,
        "h2d_bytes_per_step": float(traffic.fetched_pages.sum(axis=1).mean()) * plan.page_bytes,
        "device_bytes": plan.memory.total,
        "kv_device_bytes": plan.memory.kv,
        "host_bytes": plan.host_bytes,
        "slot_pages": float(plan.slot_pages),
        "measured_share": measured_share(source_shares(priced)),
    }
    return Evaluation(task=task, metrics=metrics, assumptions=assumptions_of(scene, plan, priced))


def question_digest(scene: Scene) -> str:
    """Names everything an evaluation depends on but the task: model, machine, costs, workload, trace, memory."""
    source, digest = scene.source, hashlib.sha256()
    records = (scene.model, scene.machine, scene.profile, scene.workload, source.trace.header)
    for record in records:
        digest.update(record.model_dump_json().encode())
    digest.update(repr((scene.kv_memory_bytes, source.resample_heads, source.repeat_steps)).encode())
    return digest.hexdigest()


def key_of(question: str, task: Task) -> str:
    """Names one evaluation: equal keys have equal results."""
    design = task.design.model_dump(mode="json", exclude={"name", "description"})
    text = json.dumps([question, sorted(task.changes), design, task.level], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain data; `from_json` reads it."""
    task = evaluation.task
    return {
        "design": task.design.model_dump(mode="json"),
        "changes": [list(change) for change in task.changes],
        "level": task.level,
        "metrics": dict(evaluation.metrics),
        "assumptions": list(evaluation.assumptions),
        "problem": evaluation.problem,
        "result": evaluation.result.model_dump(mode="json") if evaluation.result else None,
    }


def from_json(data: Mapping[str, Any]) -> Evaluation:
    """What `to_json` wrote. Raises `CloError`, `KeyError`, `TypeError` or `ValueError` for anything else."""
    changes: Changes = tuple((str(name), value) for name, value in data["changes"])
    level: Level = data["level"]
    return Evaluation(
        task=Task(design=Design.parse(data["design"]), changes=changes, level=level),
        metrics={name: float(data["metrics"][name]) for name in METRICS} if data["metrics"] else {},
        assumptions=tuple(data["assumptions"]),
        problem=str(data["problem"]),
        result=Result.parse(data["result"]) if data["result"] else None,
    )
