"""The simulator: a decode step under contention, as a SimPy process that others can be put beside.

The launching CPU thread is a SimPy process that pays for launches and blocks on synchronisation; the device it drives
is advanced analytically between its waits (`clo_sim.device`). Knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import simpy

from clo.metrics import StepTimes
from clo.pricing import Demand
from clo.schedule import Cause, Lane
from clo_sim.contention import Contention
from clo_sim.device import Device, LaneProgram, Span
from clo_sim.priced import PricedStep, Segment

CAUSES = tuple(Cause)


@dataclass(frozen=True, slots=True)
class HostInstruction:
    """One segment of the launching thread: block until (lane, completed segments), then work."""

    waits: tuple[tuple[int, int], ...]
    column: int


class SimulatedGpu:
    """One GPU with its launching thread in a SimPy environment.

    `yield from gpu.decode_step(step)` takes the simulated time of that step; `gpu.device` tells what happened in it.
    """

    def __init__(
        self, env: simpy.Environment, priced: PricedStep, *, contention: Contention | None = None, record: bool = False
    ) -> None:
        self.env = env
        self.priced = priced
        self.lanes = tuple(lane for lane in priced.graph.lanes() if lane is not Lane.LAUNCH)
        program = _Program(priced, self.lanes)
        rules = contention or Contention(priced.pricer.profile.interference)
        self.device = Device(
            program.lane_programs(),
            lambda classes: rules.rates(tuple(program.demands[number] for number in classes)),
            watched=self.lanes.index(Lane.MAIN),
            num_causes=len(CAUSES),
            record=record,
        )
        self.host = program.host_program()
        self.host_spans: list[tuple[int, float, float]] = []
        self._record = record
        self._rows = priced.durations

    def decode_step(self, step: int) -> Generator[simpy.Event, None, float]:
        """Simulate measured step `step` from now on; returns its duration, seconds.

        The device counts from the start of the step, so that a step takes the same time, bit for bit, whenever it runs.
        """
        env, device, row = self.env, self.device, self._rows[step].tolist()
        local = slept = 0.0
        device.begin_step(local, row)
        for instruction in self.host:
            for lane, count in instruction.waits:
                local = max(local, device.run_until(lane, count))
            if instruction.waits:
                yield env.timeout(local - slept)
                slept = local
            start, local = local, local + row[instruction.column]
            device.submit(local)
            if self._record:
                self.host_spans.append((instruction.column, start, local))
        yield env.timeout(local - slept)
        return local


class _Program:
    """Translates segments into what device and launching thread run."""

    def __init__(self, priced: PricedStep, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self.number = {lane: index for index, lane in enumerate(lanes)}
        self.segments: dict[Lane, list[Segment]] = {lane: [] for lane in (*lanes, Lane.LAUNCH)}
        self.columns = {id(segment): column for column, segment in enumerate(priced.segments)}
        for segment in priced.segments:
            self.segments[segment.lane].append(segment)
        self.demands: list[Demand] = [Demand()]
        self.classes = {id(segment): self._class(priced.segment_demand(segment)) for segment in priced.segments}

    def _class(self, demand: Demand) -> int:
        """Demands that agree to a percent share a class, so that few combinations of rates occur."""
        rounded = Demand(
            h2d=round(demand.h2d, 2),
            d2h=round(demand.d2h, 2),
            hbm=round(demand.hbm, 2),
            host_memory=round(demand.host_memory, 2),
            sms_taken=demand.sms_taken,
            is_dma=demand.is_dma,
            is_kernel=demand.is_kernel,
        )
        # class 0 is an idle lane; work that asks for nothing shared contends like one
        if rounded not in self.demands:
            self.demands.append(rounded)
        return self.demands.index(rounded)

    def lane_programs(self) -> list[LaneProgram]:
        return [self._lane_program(lane) for lane in self.lanes]

    def host_program(self) -> list[HostInstruction]:
        return [
            HostInstruction(
                tuple((self.number[wait.lane], wait.count) for wait in segment.after), self.columns[id(segment)]
            )
            for segment in self.segments[Lane.LAUNCH]
        ]

    def _lane_program(self, lane: Lane) -> LaneProgram:
        segments = self.segments[lane]
        return LaneProgram(
            classes=tuple(self.classes[id(segment)] for segment in segments),
            waits=tuple(self._device_waits(segment) for segment in segments),
            host_waits=tuple(self._host_wait(segment) for segment in segments),
            wakes=tuple(self._wakes(segment) for segment in segments),
            columns=tuple(self.columns[id(segment)] for segment in segments),
        )

    def _device_waits(self, segment: Segment) -> tuple[tuple[int, int, int], ...]:
        return tuple(
            (self.number[wait.lane], wait.count, CAUSES.index(wait.cause))
            for wait in segment.after
            if wait.lane is not Lane.LAUNCH
        )

    def _host_wait(self, segment: Segment) -> tuple[int, int]:
        waits = [wait for wait in segment.after if wait.lane is Lane.LAUNCH]
        return (waits[-1].count, CAUSES.index(waits[-1].cause)) if waits else (0, 0)

    def _wakes(self, segment: Segment) -> tuple[int, ...]:
        return tuple(
            self.number[lane]
            for lane in self.lanes
            if lane is not segment.lane
            and any(
                wait.lane is segment.lane and wait.count == segment.index + 1
                for other in self.segments[lane]
                for wait in other.after
            )
        )


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
        gpu, device = self.gpu, self.gpu.device
        sync = CAUSES.index(Cause.SYNC)
        for step in range(gpu.priced.num_steps):
            self.seconds[step] = yield from gpu.decode_step(step)
            self.gaps[step] = device.gaps
            self.gaps[step, sync] += self.seconds[step] - device.last_end
            self.busy[step] = device.busy

    def times(self) -> StepTimes:
        gpu = self.gpu
        lane_busy = {lane: self.busy[:, index] for index, lane in enumerate(gpu.lanes)}
        columns: dict[Lane, list[int]] = {lane: [] for lane in gpu.priced.graph.lanes()}
        for column, segment in enumerate(gpu.priced.segments):
            columns[segment.lane].append(column)
        alone = {lane: gpu.priced.durations[:, chosen].sum(axis=1) for lane, chosen in columns.items()}
        return StepTimes(
            seconds=self.seconds,
            gaps={cause: self.gaps[:, index] for index, cause in enumerate(CAUSES)},
            main_busy=lane_busy[Lane.MAIN],
            main_alone=alone[Lane.MAIN],
            lane_busy=lane_busy | {Lane.LAUNCH: alone[Lane.LAUNCH]},
        )


def spans_of(gpu: SimulatedGpu) -> list[Span]:
    """What a recording GPU ran, in order of completion."""
    return list(gpu.device.spans or ())
