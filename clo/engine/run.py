"""A measured run as a `Result`, the same record as a simulation gives. Knows nothing about how steps were run.

What a machine does not tell (what else its links could have carried, what a fresh selection would have chosen) is
left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from clo.engine.measure import MachineRun
from clo.profile import Source
from clo.results import OpTotal, Result
from clo.schedule import Cause, Lane, Part
from clo.timeline import Span

WORK = (Part.MODEL.value, Part.ATTENTION.value, Part.SELECTION.value)


def result_of(run: MachineRun) -> Result:
    """Means over the measured steps; busy time and stalls of the main stream add up to TPOT."""
    plan, traffic, seconds = run.plan, run.traffic, run.step_s
    tpot = float(seconds.mean())
    lanes = _mean_by(run, lambda span: span.lane)
    busy, stalls = _main_stream(run)
    return Result(
        executor="machine",
        model=plan.model.name,
        machine=plan.machine.name,
        profile="none",
        design=plan.design,
        workload=plan.workload.with_fields(steps=len(seconds)),
        tpot_s=tpot,
        tpot_p50_s=float(np.median(seconds)),
        tpot_p99_s=float(np.percentile(seconds, 99)),
        tokens_per_s=plan.workload.batch / tpot,
        hit_rate=traffic.hit_rate,
        reuse_rate=traffic.reuse_rate,
        h2d_bytes_per_step=_moved(run, outward=False),
        d2h_bytes_per_step=_moved(run, outward=True),
        cpu_launch_s=lanes.get(Lane.LAUNCH.value, 0.0),
        cpu_threads_s=lanes.get(Lane.POOL.value, 0.0),
        device_bytes=plan.memory.total,
        kv_device_bytes=plan.memory.kv,
        host_bytes=plan.host_bytes,
        memory={name: getattr(plan.memory, name) for name in type(plan.memory).__dataclass_fields__},
        num_pages=plan.num_pages,
        budget_pages=plan.budget_pages,
        slot_pages=plan.slot_pages,
        busy_s=busy,
        stall_s=stalls,
        contention_s=0.0,
        lane_busy_s=lanes,
        ops=_ops(run),
        measured_share=1.0,
        source_shares={Source.MEASURED.value: 1.0},
        assumptions=("contention is part of busy time: a machine does not tell them apart",),
    )


def _spans(run: MachineRun) -> Iterator[Span]:
    for timeline in run.timelines:
        yield from timeline.spans


def _mean_by(run: MachineRun, name: Callable[[Span], str]) -> dict[str, float]:
    """Seconds a step, by whatever `name` calls a span."""
    totals: dict[str, float] = {}
    for span in _spans(run):
        key = name(span)
        totals[key] = totals.get(key, 0.0) + (span.end_s - span.start_s) / len(run.timelines)
    return totals


def _main_stream(run: MachineRun) -> tuple[dict[str, float], dict[str, float]]:
    """Busy seconds by part and idle seconds by cause; a transfer or flag on the stream itself is a stall."""
    busy = dict.fromkeys(WORK, 0.0)
    stalls = {cause.value: 0.0 for cause in Cause}
    for timeline in run.timelines:
        end = 0.0
        for span in (span for span in timeline.spans if span.lane == Lane.MAIN.value):
            _account(span, busy, stalls)
            # what no wait explains is the time before the first operation came
            stalls[Cause.LAUNCH.value] += max(0.0, span.start_s - span.waited_s - end)
            end = span.end_s
        stalls[Cause.SYNC.value] += timeline.seconds - end
    steps = len(run.timelines)
    return {name: total / steps for name, total in busy.items()}, {
        name: total / steps for name, total in stalls.items()
    }


def _account(span: Span, busy: dict[str, float], stalls: dict[str, float]) -> None:
    for cause, seconds in span.waits:
        stalls[cause] += seconds
    length = span.end_s - span.start_s
    if span.part in busy:
        busy[span.part] += length
    else:
        stalls[(Cause.DEMAND if span.part == Part.TRANSFER.value else Cause.SYNC).value] += length


def _moved(run: MachineRun, *, outward: bool) -> float:
    names = ("append_kv", "write_back")
    total = sum(span.num_bytes for span in _spans(run) if (span.name in names) is outward)
    return float(total) / len(run.timelines)


def _ops(run: MachineRun) -> dict[str, OpTotal]:
    seconds = _mean_by(run, lambda span: span.name)
    calls: dict[str, int] = {}
    num_bytes: dict[str, float] = {}
    for span in _spans(run):
        calls[span.name] = calls.get(span.name, 0) + 1
        num_bytes[span.name] = num_bytes.get(span.name, 0.0) + span.num_bytes / len(run.timelines)
    return {
        name: OpTotal(
            seconds=seconds[name],
            calls=round(calls[name] / len(run.timelines)),
            num_bytes=num_bytes[name],
            source=Source.MEASURED.value,
        )
        for name in seconds
    }
