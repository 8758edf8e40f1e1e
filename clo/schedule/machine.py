"""The abstract machine that a decode step is written for. Knows nothing about durations, tensors or events.

A schedule is a generator over this machine: calls submit work and return tokens at once; a `yield` is a point where
the launching CPU thread blocks. An executor is whatever implements `Machine` and drives the generator.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NewType, Protocol

from clo.schedule.work import Work

Token = NewType("Token", int)
"""Completion of one submitted operation."""


class Lane(StrEnum):
    """A queue that runs its operations one after another, in the order of their submission."""

    LAUNCH = "launch thread"
    MAIN = "main stream"
    PREFETCH = "prefetch stream"
    H2D = "h2d copy engine"
    D2H = "d2h copy engine"
    POOL = "transfer threads"


class Cause(StrEnum):
    """Why the main stream stands still: what its next operation waits for."""

    LAUNCH = "launch"
    SYNC = "sync"
    PREFETCH = "late prefetch"
    DEMAND = "on-demand transfer"
    HOST_WORK = "CPU work"
    ORDER = "stream order"


class Part(StrEnum):
    """What an operation is for: the categories into which busy time is split."""

    MODEL = "model"
    ATTENTION = "attention"
    SELECTION = "selection"
    TRANSFER = "transfer"
    RUNTIME = "runtime"
    EXCHANGE = "all-reduce"


class Op(NamedTuple):
    """One operation: a stable name (equal in every executor), the layer it serves, its part and its work."""

    name: str
    layer: int
    part: Part
    work: Work


class Machine(Protocol):
    """The verbs. Lanes are in-order; only `wait`, `host_wait` and `ring`/`wait_flag` order lanes among each other."""

    def begin_graph(self) -> None:
        """From here on the step is one recorded graph: submitting costs the CPU nothing."""

    def launch(self, lane: Lane, op: Op) -> Token:
        """Submit a kernel or copy; outside a graph the launching thread pays for it."""

    def wait(self, lane: Lane, token: Token, cause: Cause) -> None:
        """What `lane` runs next starts after `token`; no host involvement."""

    def host_work(self, op: Op) -> Token:
        """The launching thread hands work to the transfer threads and goes on."""

    def ring(self, token: Token, layer: int) -> Token:
        """After `token` the device rings the transfer threads' doorbell; the token returned is their having seen it."""

    def flagged_work(self, seen: Token, op: Op) -> Token:
        """The transfer threads do `op` after `seen`, without the launching thread."""

    def flagged_copy(self, ready: Token, op: Op) -> Token:
        """The transfer threads hand a copy to the copy engine after `ready`."""

    def wait_flag(self, lane: Lane, seen: Token, done: Token, layer: int, cause: Cause) -> Token:
        """A small kernel on `lane` polls the ready flag, which shows the number of the request `seen` after `done`."""


@dataclass(frozen=True, slots=True)
class HostWait:
    """The launching thread blocks until `token`, then pays `op` (a synchronize or a small read-back)."""

    token: Token
    op: Op
    cause: Cause


Step = Generator[HostWait, None, None]
"""A decode step, or a piece of one."""
