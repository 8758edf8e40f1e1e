"""Records a schedule once into a graph of operations, which clock and simulator evaluate many times.

Knows nothing about durations; it is the `Machine` that only writes down what it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from clo.plan import DecodePlan
from clo.schedule.decode import decode_step
from clo.schedule.machine import Cause, HostWait, Lane, Op, Part, Token
from clo.schedule.work import Copy, HostAction, HostActionName, Submit


class Dependency(NamedTuple):
    """`node` must have ended; `cause` names the stall if this is what the main stream waits for."""

    node: int
    cause: Cause


class Node(NamedTuple):
    """One operation on one lane; it also follows the lane's previous node."""

    lane: Lane
    op: Op
    after: tuple[Dependency, ...]


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A decode step in submission order: every dependency points to an earlier node."""

    nodes: tuple[Node, ...]

    def lanes(self) -> tuple[Lane, ...]:
        """Lanes in use, in their canonical order."""
        used = {node.lane for node in self.nodes}
        return tuple(lane for lane in Lane if lane in used)


def record_step(plan: DecodePlan) -> StepGraph:
    """Run the schedule of `plan` on the recorder."""
    recorder = _Recorder()
    for wait in decode_step(plan, recorder):
        recorder.host_wait(wait)
    return StepGraph(tuple(recorder.nodes))


class _Recorder:
    """Writes down every verb as nodes; `_pending` holds waits that the next operation of a lane must respect."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._pending: dict[Lane, list[Dependency]] = {}
        self._graph_launch: Token | None = None
        self._in_graph: set[Lane] = set()
        self._host_stall: dict[Lane, Cause] = {}

    def begin_graph(self) -> None:
        self._graph_launch = self._add(Lane.LAUNCH, runtime_op("graph_launch", 0), ())

    def launch(self, lane: Lane, op: Op) -> Token:
        if self._graph_launch is None:
            submitted = self._add(Lane.LAUNCH, submission(op), ())
            return self._add(lane, op, (Dependency(submitted, self._host_stall.pop(lane, Cause.LAUNCH)),))
        first = lane not in self._in_graph
        self._in_graph.add(lane)
        return self._add(lane, op, (Dependency(self._graph_launch, Cause.LAUNCH),) if first else ())

    def wait(self, lane: Lane, token: Token, cause: Cause) -> None:
        self._pending.setdefault(lane, []).append(Dependency(token, cause))

    def host_wait(self, wait: HostWait) -> None:
        self._add(Lane.LAUNCH, wait.op, (Dependency(wait.token, wait.cause),))
        # whatever is launched next came late because the launching thread was blocked here
        self._host_stall = dict.fromkeys(Lane, wait.cause)

    def host_work(self, op: Op) -> Token:
        woken = self._add(Lane.LAUNCH, runtime_op("thread_wake", op.layer), ())
        return self._add(Lane.POOL, op, (Dependency(woken, Cause.HOST_WORK),))

    def ring(self, token: Token, layer: int) -> Token:
        return self._add(Lane.POOL, runtime_op("doorbell", layer), (Dependency(token, Cause.SYNC),))

    def flagged_work(self, seen: Token, op: Op) -> Token:
        return self._add(Lane.POOL, op, (Dependency(seen, Cause.HOST_WORK),))

    def flagged_copy(self, ready: Token, op: Op) -> Token:
        submitted = self._add(Lane.POOL, submission(op), (Dependency(ready, Cause.HOST_WORK),))
        return self._add(Lane.H2D, op, (Dependency(submitted, Cause.HOST_WORK),))

    def wait_flag(self, lane: Lane, seen: Token, done: Token, layer: int, cause: Cause) -> Token:
        self.wait(lane, done, cause)
        return self.launch(lane, runtime_op("ready_flag", layer))

    def _add(self, lane: Lane, op: Op, after: tuple[Dependency, ...]) -> Token:
        nodes = self.nodes
        pending = self._pending.pop(lane, None)
        # a lane looks for what it is to do, then for what that waits for
        waits = (*after, *pending) if pending else after
        # what runs on the same lane is waited for by its order
        nodes.append(Node(lane, op, tuple([wait for wait in waits if nodes[wait.node].lane is not lane])))
        return Token(len(nodes) - 1)


def submission(op: Op) -> Op:
    """What the CPU pays to submit `op`: a descriptor per piece of a copy, one launch otherwise."""
    if isinstance(op.work, Copy):
        return Op(f"submit {op.name}", op.layer, Part.RUNTIME, Submit(op.work.pieces))
    return Op(f"launch {op.name}", op.layer, Part.RUNTIME, HostAction("kernel_launch"))


def runtime_op(action: HostActionName, layer: int) -> Op:
    """What the launching thread does once, such as replaying a graph."""
    return Op(action, layer, Part.RUNTIME, HostAction(action))
