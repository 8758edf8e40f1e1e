"""From (model, machine, design, workload) to a `Result` or a `Timeline`, on the clock or the simulator.

Knows nothing about sweeps, files or commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from clo.errors import SpecError
from clo.plan import DecodePlan
from clo.pricing import Seconds, hbm_bytes, link_bytes
from clo.profile import Source
from clo.results import OpTotal, Result
from clo.schedule import Cause, Lane, Node, Part
from clo.schedule.ops import price_name
from clo.specs import Design
from clo_sim.assumptions import assumptions_of
from clo_sim.clock import run_clock
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep
from clo_sim.roofline import roofline
from clo_sim.scene import Scene, design_of
from clo_sim.simulator import run_simpy
from clo_sim.step_times import StepTimes

Executor = Literal["clock", "simpy"]


def simulate(
    scene: Scene, design: str | Path | Design, *, executor: Executor = "simpy", contention: Contention | None = None
) -> Result:
    """Run all measured steps of `design` (a record, a preset name or a TOML file) and sum them up.

    Raises `SpecError` or `TraceError` where the design does not fit the scene, before anything runs.
    """
    if executor not in get_args(Executor):
        raise SpecError(f"executor = {executor!r}: must be one of {', '.join(get_args(Executor))}")
    plan = scene.plan(design_of(design, scene.model))
    priced = scene.priced(plan)
    times = run_clock(priced) if executor == "clock" else run_simpy(priced, contention=contention)
    return summarise(scene, plan, priced, times, executor)


def summarise(scene: Scene, plan: DecodePlan, priced: PricedStep, times: StepTimes, executor: Executor) -> Result:
    """Step times and prices as a `Result`."""
    traffic, tpot = priced.traffic, float(times.seconds.mean())
    ops, lanes = _op_totals(priced), {lane: float(busy.mean()) for lane, busy in times.lane_busy.items()}
    h2d_bytes = float(traffic.fetched_pages.sum(axis=1).mean()) * plan.page_bytes
    shares = source_shares(priced)
    return Result(
        executor=executor,
        model=plan.model.name,
        machine=plan.machine.label,
        profile=scene.profile.name,
        design=plan.design,
        workload=plan.workload,
        tpot_s=tpot,
        tpot_p50_s=float(np.median(times.seconds)),
        tpot_p99_s=float(np.percentile(times.seconds, 99)),
        tokens_per_s=plan.workload.batch / tpot,
        num_gpus=plan.machine.tensor_parallel,
        hit_rate=traffic.hit_rate,
        reuse_rate=traffic.reuse_rate,
        overlap=traffic.overlap,
        h2d_bytes_per_step=h2d_bytes,
        d2h_bytes_per_step=float(traffic.write_back_pages.sum(axis=1).mean()) * plan.page_bytes,
        h2d_utilisation=h2d_bytes / (tpot * plan.machine.link.h2d_bytes_per_s),
        hbm_bytes_per_step=sum(_hbm_bytes(priced, node) for node in priced.graph.nodes),
        cpu_launch_s=lanes.get(Lane.LAUNCH, 0.0),
        cpu_threads_s=lanes.get(Lane.POOL, 0.0),
        device_bytes=plan.memory.total,
        kv_device_bytes=plan.memory.kv,
        host_bytes=plan.host_bytes,
        memory={name: getattr(plan.memory, name) for name in type(plan.memory).__dataclass_fields__},
        num_pages=plan.num_pages,
        budget_pages=plan.budget_pages,
        slot_pages=plan.slot_pages,
        busy_s=_busy_by_part(priced),
        stall_s=_stalls(priced, times),
        contention_s=float((times.main_busy - times.main_alone).mean()),
        lane_busy_s={lane.value: seconds for lane, seconds in lanes.items()},
        ops=ops,
        roofline=roofline(plan, scene.source, h2d_bytes),
        measured_share=measured_share(shares),
        source_shares=shares,
        assumptions=assumptions_of(scene, plan, priced),
    )


def _mean(value: Seconds) -> float:
    return float(value) if isinstance(value, float | int) else float(value.mean())


def _of_layer(value: Seconds, layer: int) -> float:
    return float(value) if isinstance(value, float | int) else float(value[:, layer].mean())


def _main_nodes(priced: PricedStep) -> list[Node]:
    return [node for node in priced.graph.nodes if node.lane is Lane.MAIN]


def _busy_by_part(priced: PricedStep) -> dict[str, float]:
    """Main-stream work by what it is for; waiting for a transfer or a flag is a stall, not work."""
    busy = {part.value: 0.0 for part in (Part.MODEL, Part.ATTENTION, Part.SELECTION)}
    for node in _main_nodes(priced):
        part = node.op.part
        if part not in (Part.TRANSFER, Part.RUNTIME):
            busy[part.value] = busy.get(part.value, 0.0) + _mean(priced.seconds(node.op))
    return busy


def _stalls(priced: PricedStep, times: StepTimes) -> dict[str, float]:
    """Idle gaps by cause; a transfer or a flag that the main stream runs itself is time it waits just the same."""
    stalls = {cause.value: float(gap.mean()) for cause, gap in times.gaps.items()}
    for node in _main_nodes(priced):
        if node.op.part is Part.TRANSFER:
            stalls[Cause.DEMAND.value] += _mean(priced.seconds(node.op))
        elif node.op.part is Part.RUNTIME:
            stalls[Cause.SYNC.value] += _mean(priced.seconds(node.op))
    return stalls


def _hbm_bytes(priced: PricedStep, node: Node) -> float:
    return _of_layer(hbm_bytes(node.op.work, priced.traffic), node.op.layer)


def _op_totals(priced: PricedStep) -> dict[str, OpTotal]:
    seconds: dict[str, float] = {}
    num_bytes: dict[str, float] = {}
    calls: dict[str, int] = {}
    sources: dict[str, str] = {}
    for node in priced.graph.nodes:
        name, pricer = node.op.name, priced.pricer
        seconds[name] = seconds.get(name, 0.0) + _mean(priced.seconds(node.op))
        moved = link_bytes(node.op.work, priced.traffic)
        num_bytes[name] = num_bytes.get(name, 0.0) + _of_layer(moved, node.op.layer)
        calls[name] = calls.get(name, 0) + 1
        sources[name] = pricer.source(node.op.work, price_name(node.op)).value
    return {
        name: OpTotal(seconds=seconds[name], calls=calls[name], num_bytes=num_bytes[name], source=sources[name])
        for name in seconds
    }


def source_shares(priced: PricedStep) -> dict[str, float]:
    """Share of all busy time, on every lane, that rests on each kind of source."""
    seconds: dict[str, float] = {}
    for task, places in priced.shape.places.items():
        price, source = priced.prices[task], priced.pricer.source(task.work, task.name).value
        if isinstance(price, float | int):
            total = float(price) * len(places.layers)
        else:
            total = float(price.mean(axis=0)[places.layers].sum())
        seconds[source] = seconds.get(source, 0.0) + total
    busy = sum(seconds.values())
    return {source: spent / busy for source, spent in seconds.items()}


def measured_share(shares: Mapping[str, float]) -> float:
    """The part of `source_shares` that somebody measured."""
    return sum(share for source, share in shares.items() if Source(source).is_measured)
