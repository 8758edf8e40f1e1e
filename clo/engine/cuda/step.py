"""What a CUDA machine knows of one step: its operations, their marks and waits, and what a replay needs of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum

from clo.engine.cuda.device import Event, Graph
from clo.engine.cuda.spans import HostMark, Mark, Waited
from clo.engine.cuda.threads import Errand, Ledger
from clo.schedule import Cause, HostWait, Lane, Op, Token


class Mode(Enum):
    """How a step is run."""

    ALONE = "every operation by itself"
    EAGER = "submitted one by one"
    CAPTURE = "recorded as a graph"


@dataclass(slots=True)
class SubmittedStep:
    """Everything of one step. Of a recorded one it stays, and each replay fills in its times again."""

    title: str
    prepare: Callable[[], None]
    mode: Mode
    ledger: Ledger
    marks: list[Mark] = field(default_factory=list)
    host: list[HostMark] = field(default_factory=list)
    pending: dict[Lane, list[Waited]] = field(default_factory=dict)
    late: dict[Lane, Cause] = field(default_factory=dict)
    entered: set[Lane] = field(default_factory=set)
    used: set[Lane] = field(default_factory=set)
    rung: dict[Token, tuple[int, Lane, Event]] = field(default_factory=dict)
    answers: list[tuple[Token, int]] = field(default_factory=list)
    errands: list[Errand] = field(default_factory=list)
    polls: list[tuple[Op, int]] = field(default_factory=list)
    is_open: bool = False
    in_graph: bool = False
    forked: Event = None
    opened: Event = None
    finished: Event = None
    capture: ExitStack | None = None
    graph: Graph = None
    zero_s: float = 0.0
    free_s: float = 0.0

    def mark(self, lane: Lane, op: Op) -> Token:
        """`op` is next on `lane`, after what was waited for."""
        waits = tuple(self.pending.pop(lane, ()))
        submitted = None if self.in_graph and lane in self.entered else time.perf_counter()
        self.marks.append(Mark(lane, op, waits, self.late.pop(lane, Cause.LAUNCH), submitted))
        return Token(len(self.marks) - 1)

    def host_mark(self, op: Op, waits: tuple[tuple[str, float], ...] = ()) -> None:
        """The launching thread works without pause but where it waits."""
        ended = time.perf_counter()
        self.host.append(HostMark(op, self.free_s, ended, waits))
        self.free_s = ended


@dataclass(slots=True)
class RecordedStep:
    """A step that can be replayed as long as `key` is what it was."""

    graph: Graph
    step: SubmittedStep
    wait: HostWait
    key: Hashable
