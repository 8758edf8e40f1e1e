"""How missing pages reach their slots: one generator for each pair of transfer engine and synchronisation.

Knows nothing about which pages: counts come from the traffic, addresses from the machine.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from clo.schedule.machine import Cause, HostWait, Lane, Machine, Op, Token
from clo.schedule.ops import Stage, StepOps
from clo.specs import ResolveOn, Sync, Transfer


class Arrival(NamedTuple):
    """When data has arrived: with `done`.

    Streams learn of it by themselves, or, where transfer threads bring it on a doorbell, only through the ready flag
    of that request (`seen`).
    """

    done: Token
    seen: Token | None = None


Fetch = Generator[HostWait, None, Arrival]
"""A piece of a step that ends with the data's arrival."""


def wait_for(m: Machine, stream: Lane, arrival: Arrival, layer: int, cause: Cause) -> None:
    """What `stream` runs next sees the data."""
    if arrival.seen is None:
        m.wait(stream, arrival.done, cause)
    else:
        m.wait_flag(stream, arrival.seen, arrival.done, layer, cause)


def needs_host(ops: StepOps) -> bool:
    """Whether the launching thread must learn the page list before a transfer can start."""
    design = ops.plan.design
    return _cpu_involved(ops) and design.sync in (Sync.HOST, Sync.EVENTS)


def _cpu_involved(ops: StepOps) -> bool:
    return ops.plan.design.cpu_moves or ops.plan.design.resolve_on is ResolveOn.CPU


def fetch(
    m: Machine, ops: StepOps, stage: Stage, layer: int, chosen: Token, stream: Lane, ahead: Arrival | None = None
) -> Fetch:
    """Move what selection `chosen` found missing; later work that waits for the arrival sees the data.

    `ahead` is the arrival of what was prefetched for the same layer: transfer threads serve it first, so that a wait
    for their flag begins with a wait for it; and a kernel must not write into a slot that an earlier one still fills.
    """
    if needs_host(ops):
        return (yield from _by_host(m, ops, stage, layer, chosen, stream, ahead))
    if _cpu_involved(ops):
        return _by_flags(m, ops, stage, layer, chosen, stream, ahead)
    return _gather(m, ops, stage, layer, stream, ahead)


def _gather(m: Machine, ops: StepOps, stage: Stage, layer: int, stream: Lane, ahead: Arrival | None) -> Arrival:
    if ahead is not None:
        wait_for(m, stream, ahead, layer, Cause.PREFETCH)
    return Arrival(m.launch(stream, ops.gather_pages(stage, layer)))


def _by_host(
    m: Machine, ops: StepOps, stage: Stage, layer: int, chosen: Token, stream: Lane, ahead: Arrival | None
) -> Fetch:
    """The launching thread reads the page list back, has it resolved and moved, and launches what depends on it."""
    design, cause = ops.plan.design, stage_cause(stage)
    yield HostWait(chosen, ops.host_action("read_back", layer), Cause.SYNC)
    if design.resolve_on is ResolveOn.CPU:
        yield _joined(m.host_work(ops.lru_update(stage, layer)), ops, layer, Cause.HOST_WORK)
    if design.transfer is Transfer.GPU_ZERO_COPY:
        done = _gather(m, ops, stage, layer, stream, ahead).done
    elif design.transfer is Transfer.CPU_ZERO_COPY:
        done = m.host_work(ops.bar_write(stage, layer))
        # nothing but the CPU knows when a BAR write has landed: it must be waited for before the launch
        yield _joined(done, ops, layer, cause)
    else:
        if design.transfer is Transfer.STAGED:
            yield _joined(m.host_work(ops.host_gather(stage, layer)), ops, layer, Cause.HOST_WORK)
        done = m.launch(Lane.H2D, _copy_op(ops, stage, layer))
    if design.sync is Sync.HOST:
        yield HostWait(done, ops.host_action("stream_sync", layer), cause)
    return Arrival(done)


def _by_flags(
    m: Machine, ops: StepOps, stage: Stage, layer: int, chosen: Token, stream: Lane, ahead: Arrival | None
) -> Arrival:
    """Transfer threads see a doorbell, resolve and move, and publish a ready flag for whoever needs the data."""
    design = ops.plan.design
    seen = done = m.ring(chosen, layer)
    if ahead is not None:
        wait_for(m, stream, ahead, layer, Cause.PREFETCH)
    if design.resolve_on is ResolveOn.CPU:
        done = m.flagged_work(done, ops.lru_update(stage, layer))
    if design.transfer is Transfer.GPU_ZERO_COPY:
        m.wait_flag(stream, seen, done, layer, stage_cause(stage))
        return Arrival(m.launch(stream, ops.gather_pages(stage, layer)))
    if design.transfer is Transfer.CPU_ZERO_COPY:
        done = m.flagged_work(done, ops.bar_write(stage, layer))
    else:
        if design.transfer is Transfer.STAGED:
            done = m.flagged_work(done, ops.host_gather(stage, layer))
        done = m.flagged_copy(done, _copy_op(ops, stage, layer))
    return Arrival(done, seen)


def stage_cause(stage: Stage) -> Cause:
    """What a stall on this stage's data is called."""
    return Cause.PREFETCH if stage is Stage.PREFETCH else Cause.DEMAND


def _copy_op(ops: StepOps, stage: Stage, layer: int) -> Op:
    staged = ops.plan.design.transfer is Transfer.STAGED
    return ops.copy_staged(stage, layer) if staged else ops.copy_pages(stage, layer)


def _joined(token: Token, ops: StepOps, layer: int, cause: Cause) -> HostWait:
    return HostWait(token, ops.host_action("thread_wake", layer), cause)
