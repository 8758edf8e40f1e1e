"""A measured run and its simulation, number by number. Knows nothing about which runs are made.

The simulation replays the hits and misses of the run, so that what differs is time alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clo.engine.measure import MachineRun
from clo.operation_costs import OperationPricer, OperationProfile
from clo.schedule import Lane
from clo.timeline import Timeline
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep, StepShape, price_step
from clo_sim.simulator import run_simpy
from clo_sim.unfold import simulated_timeline

Ablation = Literal["nothing", "interference", "launch cost", "synchronisation cost"]
ABLATIONS: tuple[Ablation, ...] = ("nothing", "interference", "launch cost", "synchronisation cost")

GROWTH = 0.02
"""A context grows by a token a step; in simulation it keeps the length at which the run began."""

LAUNCH_COSTS = ("kernel_launch", "graph_launch", "submit", "thread_wake")
SYNC_COSTS = ("stream_sync", "read_back", "doorbell", "ready_flag")


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One step, the median one of the run, in both worlds."""

    real: Timeline
    simulated: Timeline

    def operations(self) -> dict[str, tuple[float, float]]:
        """Seconds of each operation of the step, over all layers: (real, simulated)."""
        return _paired(_totals(self.real, "name"), _totals(self.simulated, "name"))

    def lanes(self) -> dict[str, tuple[float, float]]:
        """Busy seconds of each lane: (real, simulated)."""
        return _paired(_totals(self.real, "lane"), _totals(self.simulated, "lane"))

    def stalls(self) -> dict[str, tuple[float, float]]:
        """What the main stream waited for, seconds by cause: (real, simulated)."""
        return _paired(_waits(self.real), _waits(self.simulated))

    def differences(self) -> list[str]:
        """Where the two worlds do not name the same operations in the same order with the same bytes, for people."""
        found = []
        for lane in sorted({*self.real.lanes, *self.simulated.lanes}):
            real, simulated = _sequence(self.real, lane), _sequence(self.simulated, lane)
            if len(real) != len(simulated):
                found.append(f"{lane}: {len(real)} operations on the machine, {len(simulated)} in simulation")
            unlike = (pair for pair in zip(real, simulated, strict=False) if not _same(*pair))
            if pair := next(unlike, None):
                found.append(f"{lane}: {pair[0]} on the machine, {pair[1]} in simulation")
        return found


def price_run(profile: OperationProfile, run: MachineRun) -> PricedStep:
    """The run's own hits and misses at the profile's costs."""
    return price_step(StepShape.of_plan(run.plan), OperationPricer(profile, run.plan), run.traffic)


def compare(profile: OperationProfile, run: MachineRun) -> Comparison:
    """The median step of `run`, and the same step simulated."""
    step, priced = run.median_step, price_run(profile, run)
    title = f"{run.plan.design.name} (simulated)"
    # what a fit found to take no time is an operation all the same
    return Comparison(run.timelines[step], simulated_timeline(priced, step, title, everything=True))


def simulated_s(profile: OperationProfile, run: MachineRun, without: Ablation = "nothing") -> float:
    """Median step time as simulated, seconds, with a part of the model left out."""
    priced = price_run(_without(profile, without), run)
    rules = Contention(priced.pricer.interference)
    return float(np.median(run_simpy(priced, contention=rules).seconds))


def _without(profile: OperationProfile, part: Ablation) -> OperationProfile:
    operations = dict(profile.operations)
    if part == "interference":
        operations = {name: cost.model_copy(update={"slowed": 0.0}) for name, cost in operations.items()}
    silent = {"launch cost": LAUNCH_COSTS, "synchronisation cost": SYNC_COSTS}.get(part, ())
    operations |= {name: operations[name].model_copy(update={"per_unit": {}}) for name in silent if name in operations}
    handover = {} if part == "synchronisation cost" else profile.handover_s
    return profile.model_copy(update={"operations": operations, "handover_s": handover})


def _totals(timeline: Timeline, field: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for span in timeline.spans:
        name = str(getattr(span, field))
        totals[name] = totals.get(name, 0.0) + span.end_s - span.start_s
    return totals


def _waits(timeline: Timeline) -> dict[str, float]:
    waits: dict[str, float] = {}
    for span in timeline.spans:
        if span.lane == Lane.MAIN.value:
            for cause, seconds in span.waits:
                waits[cause] = waits.get(cause, 0.0) + seconds
    return waits


def _paired(real: dict[str, float], simulated: dict[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (real.get(name, 0.0), simulated.get(name, 0.0)) for name in {**real, **simulated}}


def _same(real: tuple[str, int, float], simulated: tuple[str, int, float]) -> bool:
    return real[:2] == simulated[:2] and abs(real[2] - simulated[2]) <= GROWTH * simulated[2]


def _sequence(timeline: Timeline, lane: str) -> list[tuple[str, int, float]]:
    spans = sorted((span for span in timeline.spans if span.lane == lane), key=lambda span: span.start_s)
    return [(span.name, span.layer, span.num_bytes) for span in spans]
