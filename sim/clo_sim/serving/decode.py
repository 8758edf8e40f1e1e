"""Prices of decode steps over batch and context, from the step executors, on a grid that fills as it is asked.

Knows nothing about requests. A batch of unequal contexts is priced as one of equal contexts with the same mean. Slots
take the memory that the batch leaves, so more sequences mean smaller caches and more misses, as the design has it.

Every priced batch size has a column of prices over contexts, up to the longest that memory holds. Between two columns,
points with equal tokens on a GPU are joined: caches are then as full, and what steps read grows alike. Of GPUs with
sequences of their own a step waits for the fullest.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clo.errors import SpecError
from clo.kernel_scaling import measured_on
from clo.plan import DecodePlan
from clo.schedule.ops import experts_work
from clo.schedule.work import Experts, Gemm
from clo.specs import Design
from clo.table_prices import TablePrices
from clo_sim.clock import step_seconds
from clo_sim.intervals import CostDraw, known_share
from clo_sim.priced import PricedStep
from clo_sim.run import Executor, summarise
from clo_sim.scene import Scene, gpu_tables
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.memory import at_context, memory_need, memory_room, roomy, smallest_plan
from clo_sim.serving.requests import NS_PER_S
from clo_sim.simulator import run_simpy

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BUCKETS = 2048
"""At most so many different step times of one batch size, over all contexts."""
SMALLEST_BUCKET = 6
"""Bucket width of at least 64 tokens, as a power of two."""

SHORTEST = 128
"""No context is priced as shorter than this."""

Floats = NDArray[np.float64]
Steps = dict[tuple[int, int], PricedStep]
"""Priced steps by batch and context."""


class DecodePrices:
    """Step times of one design in one scene. Each grid point is priced once, when it is first needed.

    `cpu_s` is what pricing has taken so far, CPU seconds of this process.
    """

    def __init__(
        self,
        scene: Scene,
        design: Design,
        *,
        max_context: int,
        executor: Executor = "clock",
        draw: CostDraw | None = None,
        steps: Steps | None = None,
    ) -> None:
        self.scene = scene
        self.design = design
        self.executor = executor
        self.max_context = min(max_context, scene.model.max_positions)
        self._need, self._room = memory_need(scene, design), memory_room(scene)
        self.cpu_s = 0.0
        self._draw, self._steps = draw, {} if steps is None else steps
        self._columns: dict[int, tuple[list[int], Floats]] = {}
        self._clocks: dict[int, StepClock] = {}

    def clock(self, batch: int) -> StepClock:
        """Step times at this batch size, over all contexts."""
        if batch not in self._clocks:
            self._clocks[batch] = self._interpolated(batch)
        return self._clocks[batch]

    def drawn(self, draw: CostDraw) -> DecodePrices:
        """The same design with costs drawn from their spreads; steps are planned once for all draws."""
        return DecodePrices(
            self.scene,
            self.design,
            max_context=self.max_context,
            executor=self.executor,
            draw=draw,
            steps=self._steps,
        )

    def seconds(self, batch: int, context_tokens: int) -> float:
        """Step time at one point, not interpolated."""
        priced, factor = self._step(batch, context_tokens), 1.0
        if self._draw is not None:
            priced, factor = self._draw.of(priced), self._draw.common(priced)
        times = step_seconds(priced) if self.executor == "clock" else run_simpy(priced).seconds
        return factor * float(times.mean())

    def known_share(self, batch: int, context_tokens: int) -> float:
        """Share of a step's busy time whose costs have a known spread."""
        return known_share(self._step(max(1, batch), max(1, min(context_tokens, self.max_context))))

    def measured_share(self, batch: int, context_tokens: int) -> float:
        """Share of a step's busy time whose costs were measured."""
        scene, plan = self._plan(max(1, batch), max(1, min(context_tokens, self.max_context)))
        priced = scene.priced(plan)
        return summarise(scene, plan, priced, run_simpy(priced), "simpy").measured_share

    @property
    def kernels_measured(self) -> bool:
        """Whether times of GEMMs, and of what else the model needs a table for, were measured on this GPU."""
        profile, machine = gpu_tables(self.scene.profile, "serving"), self.scene.machine
        prices, model = TablePrices(profile, machine), self.scene.part
        widths = (model.weight_bytes_per_value, model.mlp_weight_bytes)
        products: list[Gemm | Experts] = [Gemm(1, 1, 1, width) for width in widths]
        if model.experts is not None:
            products.append(experts_work(model, model.experts, 1))
        sums = profile.all_reduce if machine.tensor_parallel > 1 else None
        latent = prices.latent_attention(model.kv_bytes_per_value) if model.latent else None
        others = all(measured_on(table, machine.gpu) for table in (sums, latent) if table is not None)
        return others and all(map(prices.measured_here, products))

    def _interpolated(self, batch: int) -> StepClock:
        high = bisect_left(BATCHES, batch)
        if high == len(BATCHES):
            raise SpecError(f"max_batch: no step of {batch} sequences is priced, at most {BATCHES[-1]}")
        shift = max(SMALLEST_BUCKET, (self.max_context // BUCKETS).bit_length())
        middles = ((np.arange((self.max_context >> shift) + 1) << shift) + (1 << shift) / 2).astype(np.float64)
        tokens = self.scene.machine.own_sequences(batch) * middles
        seconds = self._at_tokens(BATCHES[high], tokens)
        if BATCHES[high] != batch:
            low = BATCHES[high - 1]
            weight = (batch - low) / (BATCHES[high] - low)
            seconds = (1 - weight) * self._at_tokens(low, tokens) + weight * seconds
        return StepClock.of(np.rint(seconds * NS_PER_S).astype(np.int64).tolist(), shift=shift)

    def _at_tokens(self, batch: int, tokens: Floats) -> Floats:
        """Step times of a priced batch size of which a GPU holds so many tokens."""
        if batch not in self._columns:
            start = time.process_time()
            contexts = self._nodes(batch)
            self._columns[batch] = contexts, np.array([self.seconds(batch, context) for context in contexts])
            self.cpu_s += time.process_time() - start
        return np.asarray(np.interp(tokens / self.scene.machine.own_sequences(batch), *self._columns[batch]))

    def _nodes(self, batch: int) -> list[int]:
        """Contexts to price: powers of two up to the longest that the trace, the model and memory allow."""
        longest = min(2 * self.max_context, self.scene.model.max_positions)
        need, room, sequences = self._need, self._room, self.scene.machine.own_sequences(batch)
        if need.device_per_token:
            left = room.device // sequences - need.owners * need.device_base
            longest = min(longest, left // (need.owners * need.device_per_token))
        if need.host_per_token:
            longest = min(longest, room.host // sequences // (need.owners * need.host_per_token))
        # close to the limit caches are small, and times rise ever faster
        steep = [round(share * longest) for share in (0.75, 0.9)] if longest < self.max_context else []
        return sorted({*_context_nodes(max(longest, SHORTEST)), *(one for one in steep if one > SHORTEST)})

    def _step(self, batch: int, context_tokens: int) -> PricedStep:
        """Kept where it will be asked for again, with other costs."""
        if (batch, context_tokens) in self._steps:
            return self._steps[batch, context_tokens]
        scene, plan = self._plan(batch, context_tokens)
        priced = scene.priced(plan)
        if self._draw is not None:
            self._steps[batch, context_tokens] = priced
        return priced

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
    nodes, length = [], SHORTEST
    while length < longest:
        nodes.append(length)
        length *= 2 if length >= 1024 else 4
    return [*nodes, longest]
