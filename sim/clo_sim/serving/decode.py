"""Prices of decode steps over batch and context, from the step executors, on a grid that fills as it is asked.

Knows nothing about requests. A batch of unequal contexts is priced as one of equal contexts with the same mean. Slots
take the memory that the batch leaves, so more sequences mean smaller caches and more misses, as the design has it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.specs import Design
from clo_sim.clock import step_seconds
from clo_sim.run import Executor, summarise
from clo_sim.scene import Scene
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.memory import at_context, roomy, smallest_plan
from clo_sim.serving.requests import NS_PER_S
from clo_sim.simulator import run_simpy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BUCKETS = 2048
"""At most so many different step times of one batch size, over all contexts."""
SMALLEST_BUCKET = 6
"""Bucket width of at least 64 tokens, as a power of two."""

Floats = NDArray[np.float64]


class DecodePrices:
    """Step times of one design in one scene. Each grid point is priced once, when it is first needed.

    `cpu_s` is what pricing has taken so far, CPU seconds of this process.
    """

    def __init__(self, scene: Scene, design: Design, *, max_context: int, executor: Executor = "clock") -> None:
        self.scene = scene
        self.design = design
        self.executor = executor
        self.max_context = min(max_context, scene.model.max_positions)
        self.contexts = _context_nodes(self.max_context)
        self.cpu_s = 0.0
        self._columns: dict[int, Floats] = {}
        self._clocks: dict[int, StepClock] = {}

    def clock(self, batch: int) -> StepClock:
        """Step times at this batch size, over all contexts."""
        if batch not in self._clocks:
            self._clocks[batch] = self._interpolated(batch)
        return self._clocks[batch]

    def seconds(self, batch: int, context_tokens: int) -> float:
        """Step time at one point, not interpolated."""
        scene, plan = self._plan(batch, context_tokens)
        priced = scene.priced(plan)
        times = step_seconds(priced) if self.executor == "clock" else run_simpy(priced).seconds
        return float(times.mean())

    def measured_share(self, batch: int, context_tokens: int) -> float:
        """Share of a step's busy time whose costs were measured."""
        scene, plan = self._plan(max(1, batch), max(1, min(context_tokens, self.max_context)))
        priced = scene.priced(plan)
        return summarise(scene, plan, priced, run_simpy(priced), "simpy").measured_share

    @property
    def num_priced(self) -> int:
        """Grid points priced so far."""
        return len(self._columns) * len(self.contexts)

    def _interpolated(self, batch: int) -> StepClock:
        high = bisect_left(BATCHES, batch)
        if high == len(BATCHES):
            raise SpecError(f"max_batch: no step of {batch} sequences is priced, at most {BATCHES[-1]}")
        column = self._column(BATCHES[high])
        if BATCHES[high] != batch:
            low = BATCHES[high - 1]
            weight = (batch - low) / (BATCHES[high] - low)
            column = (1 - weight) * self._column(low) + weight * column
        shift = max(SMALLEST_BUCKET, (self.max_context // BUCKETS).bit_length())
        middles = (np.arange((self.max_context >> shift) + 1) << shift) + (1 << shift) / 2
        steps = np.rint(np.interp(middles, self.contexts, column) * NS_PER_S).astype(np.int64)
        return StepClock.of(steps.tolist(), shift=shift)

    def _column(self, batch: int) -> Floats:
        if batch not in self._columns:
            start = time.process_time()
            self._columns[batch] = np.array([self.seconds(batch, context) for context in self.contexts])
            self.cpu_s += time.process_time() - start
        return self._columns[batch]

    def _plan(self, batch: int, context_tokens: int) -> tuple[Scene, DecodePlan]:
        """The plan where it fits; elsewhere, for interpolation only, one with the smallest cache."""
        workload = self.scene.workload.model_copy(update={"batch": batch, "context_tokens": context_tokens})
        scene = replace(self.scene, workload=workload)
        try:
            return scene, scene.plan(at_context(self.design, context_tokens))
        except SpecError:
            plan = smallest_plan(scene, self.design, batch=batch, context_tokens=context_tokens)
            return roomy(scene), plan


def _context_nodes(longest: int) -> list[int]:
    nodes, length = [], 128
    while length < longest:
        nodes.append(length)
        length *= 2 if length >= 1024 else 4
    return [*nodes, longest]
