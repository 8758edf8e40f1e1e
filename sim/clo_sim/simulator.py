"""The simulator: a decode step under contention, as a SimPy process that others can be put beside.

The launching CPU thread is a SimPy process that pays for launches and blocks on synchronisation; the device it drives
is advanced analytically between its waits (`clo_sim.device`). Knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import simpy

from clo.pricing import Demand
from clo.schedule import Cause, Lane
from clo_sim.contention import Contention
from clo_sim.device import Device, LaneProgram, Rates
from clo_sim.pair import LanePair
from clo_sim.priced import PricedStep, Segment
from clo_sim.step_times import StepTimes

CAUSES = tuple(Cause)
SYNC = CAUSES.index(Cause.SYNC)


@dataclass(frozen=True, slots=True)
class HostInstruction:
    """One segment of the launching thread: block until (lane, completed segments), then work."""

    waits: tuple[tuple[int, int], ...]
    column: int


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One simulated step: its duration, the main stream's gaps by cause, and the lanes' busy time."""

    seconds: float
    gaps: Sequence[float]
    busy: Sequence[float]


class SimulatedGpu:
    """One GPU with its launching thread in a SimPy environment.

    `outcome = yield from gpu.decode_step(step)` takes the simulated time of that step. Times within a step count from
    its start, so that a step takes the same time, bit for bit, whenever it runs.
    """

    def __init__(
        self, env: simpy.Environment, priced: PricedStep, *, contention: Contention | None = None, record: bool = False
    ) -> None:
        self.env = env
        self.priced = priced
        self.lanes = tuple(lane for lane in priced.graph.lanes() if lane is not Lane.LAUNCH)
        self.host_spans: list[tuple[int, float, float]] = []
        program = _Program(priced, self.lanes)
        rules = contention or Contention(priced.pricer.interference)
        self._rates: Rates = lambda classes: rules.rates(tuple(program.demands[number] for number in classes))
        self._programs = program.lane_programs()
        self._main = self.lanes.index(Lane.MAIN)
        self._host = program.host_program()
        self._record = record
        self._rows = priced.durations.T
        self.device = Device(
            self._programs,
            self._rates,
            watched=self._main,
            num_causes=len(CAUSES),
            handover_s=[priced.handover_s.get(lane, 0.0) for lane in self.lanes],
            record=record,
        )
        self._pair = None if record else self._make_pair()

    def decode_step(self, step: int) -> Generator[simpy.Event, None, StepOutcome]:
        """Simulate measured step `step` from now on."""
        row = self._rows[step].tolist()
        if self._pair is not None:
            return (yield from self._graph_step(self._pair, row))
        return (yield from self._launched_step(step, row))

    def _make_pair(self) -> LanePair | None:
        """The fast service of a graph: one submission, then nothing but the device until the launching thread wakes.

        Where lanes hand over at once.
        """
        one_submission = len(self._host) == 2 and not self._host[0].waits
        if self.priced.handover_s or not one_submission or len(self._programs) > 2:
            return None
        idle = LaneProgram((), (), (), (), ())
        others = [program for lane, program in enumerate(self._programs) if lane != self._main]
        return LanePair(self._programs[self._main], others[0] if others else idle, self._rates, len(CAUSES))

    def _graph_step(self, pair: LanePair, row: list[float]) -> Generator[simpy.Event, None, StepOutcome]:
        submit, finish = self._host
        done = pair.run(row[submit.column], row)
        seconds = done.end + row[finish.column]
        yield self.env.timeout(seconds)
        main, other = done.busy
        busy = (main, other) if self._main == 0 else (other, main)
        return StepOutcome(seconds, _closed(done.gaps, seconds - done.end), busy[: len(self.lanes)])

    def _launched_step(self, step: int, row: list[float]) -> Generator[simpy.Event, None, StepOutcome]:
        env, device = self.env, self.device
        local = slept = 0.0
        woken_s, unseen_s = self.priced.handover_s.get(Lane.LAUNCH, 0.0), self.priced.unseen_s
        device.begin_step(local, row)
        for instruction in self._host:
            for lane, count in instruction.waits:
                local = max(local, device.run_until(lane, count) + woken_s)
            if instruction.waits:
                yield env.timeout(local - slept)
                slept = local
            start, local = local, local + row[instruction.column]
            device.submit(local + unseen_s[instruction.column][step] if instruction.column in unseen_s else local)
            if self._record:
                self.host_spans.append((instruction.column, start, local))
        yield env.timeout(local - slept)
        return StepOutcome(local, _closed(device.gaps, local - device.last_end), tuple(device.busy))


def _closed(gaps: Sequence[float], rest: float) -> list[float]:
    """The main stream's last gap, to the end of the step, is the launching thread's synchronisation."""
    closed = list(gaps)
    closed[SYNC] += rest
    return closed


class _Program:
    """Translates segments into what device and launching thread run."""

    def __init__(self, priced: PricedStep, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.number = {lane: index for index, lane in enumerate(lanes)}
        self.columns: dict[Lane, list[int]] = {lane: [] for lane in (*lanes, Lane.LAUNCH)}
        self.segments = priced.segments
        self.demands: list[Demand] = [Demand()]
        self.classes = [self._class(demand) for demand in priced.demands]
        self.wakes: list[set[int]] = [set() for _ in self.segments]
        for column, segment in enumerate(self.segments):
            self.columns[segment.lane].append(column)
            for wait in segment.after:
                if segment.lane is not Lane.LAUNCH:
                    self.wakes[wait.segment].add(self.number[segment.lane])

    def _class(self, demand: Demand) -> int:
        """Demands that agree to a percent share a class, so that few combinations of rates occur.

        Class 0 is an idle lane; work that asks for nothing shared contends like one.
        """
        rounded = replace(
            demand,
            h2d=round(demand.h2d, 2),
            d2h=round(demand.d2h, 2),
            hbm=round(demand.hbm, 2),
            host_memory=round(demand.host_memory, 2),
            slowed=round(demand.slowed, 2),
            host_share=round(demand.host_share, 2),
        )
        if rounded not in self.demands:
            self.demands.append(rounded)
        return self.demands.index(rounded)

    def lane_programs(self) -> list[LaneProgram]:
        return [self._lane_program(self.columns[lane]) for lane in self.lanes]

    def host_program(self) -> list[HostInstruction]:
        return [
            HostInstruction(
                tuple((self.number[wait.lane], wait.completed) for wait in self.segments[column].after), column
            )
            for column in self.columns[Lane.LAUNCH]
        ]

    def _lane_program(self, columns: list[int]) -> LaneProgram:
        return LaneProgram(
            classes=tuple(self.classes[column] for column in columns),
            waits=tuple(self._device_waits(self.segments[column]) for column in columns),
            host_waits=tuple(self._host_wait(self.segments[column]) for column in columns),
            wakes=tuple(tuple(sorted(self.wakes[column])) for column in columns),
            columns=tuple(columns),
        )

    def _device_waits(self, segment: Segment) -> tuple[tuple[int, int, int], ...]:
        return tuple(
            (self.number[wait.lane], wait.completed, CAUSES.index(wait.cause))
            for wait in segment.after
            if wait.lane is not Lane.LAUNCH
        )

    def _host_wait(self, segment: Segment) -> tuple[int, int]:
        waits = [wait for wait in segment.after if wait.lane is Lane.LAUNCH]
        return (waits[-1].completed, CAUSES.index(waits[-1].cause)) if waits else (0, 0)


def run_simpy(priced: PricedStep, *, contention: Contention | None = None) -> StepTimes:
    """All measured steps one after another; memory does not grow with them beyond a few numbers a step."""
    env = simpy.Environment()
    gpu = SimulatedGpu(env, priced, contention=contention)
    collected = _Collected(gpu)
    env.process(collected.run())
    env.run()
    return collected.times()


class _Collected:
    """Runs every step of a GPU and keeps its totals."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        steps = gpu.priced.num_steps
        self.gpu = gpu
        self.seconds = np.zeros(steps)
        self.gaps = np.zeros((steps, len(CAUSES)))
        self.busy = np.zeros((steps, len(gpu.lanes)))

    def run(self) -> Generator[simpy.Event, None, None]:
        for step in range(len(self.seconds)):
            outcome = yield from self.gpu.decode_step(step)
            self.seconds[step] = outcome.seconds
            self.gaps[step] = outcome.gaps
            self.busy[step] = outcome.busy

    def times(self) -> StepTimes:
        gpu = self.gpu
        lane_busy = {lane: self.busy[:, index] for index, lane in enumerate(gpu.lanes)}
        alone = {lane: np.zeros(len(self.seconds)) for lane in gpu.priced.graph.lanes()}
        for segment, seconds in zip(gpu.priced.segments, gpu.priced.durations, strict=True):
            alone[segment.lane] += seconds
        return StepTimes(
            seconds=self.seconds,
            gaps={cause: self.gaps[:, index] for index, cause in enumerate(CAUSES)},
            main_busy=lane_busy[Lane.MAIN],
            main_alone=alone[Lane.MAIN],
            lane_busy=lane_busy | {Lane.LAUNCH: alone[Lane.LAUNCH]},
        )
