"""Streams, copy engines and transfer threads of one GPU as fluid servers: the inside of the simulator.

Each lane serves its segments in order; the rates of those in service follow from who else is in service. Nothing is
scheduled ahead: the device is advanced, exactly, to the moment its launching thread waits for. Knows nothing about
SimPy, prices or designs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clo.errors import CloError

NEVER = float("inf")

Rates = Callable[[tuple[int, ...]], tuple[float, ...]]
"""Contention class in service by lane (0: idle) -> relative rate by lane."""


@dataclass(frozen=True, slots=True)
class LaneProgram:
    """What one lane does in a step, by segment: all tuples have one entry a segment.

    `waits`: (lane, completed segments, cause) triples; `host_waits`: (submissions, cause), 0 submissions for none;
    `wakes`: lanes that may be waiting for this segment; `columns`: where its duration stands in a step's row.
    """

    classes: tuple[int, ...]
    waits: tuple[tuple[tuple[int, int, int], ...], ...]
    host_waits: tuple[tuple[int, int], ...]
    wakes: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """One segment as it ran; `waits` are (cause, seconds) of the lane's idle time just before it."""

    lane: int
    position: int
    start: float
    end: float
    waits: tuple[tuple[int, float], ...]


class Device:
    """Lanes in fluid service. One step at a time; between steps every lane is idle.

    `watched` is the lane whose gaps are accounted by cause (the main stream). A lane sees what another one, or the
    launching thread, has completed `handover_s[lane]` later. With `record`, `spans` keeps what ran.
    """

    def __init__(
        self,
        programs: Sequence[LaneProgram],
        rates: Rates,
        *,
        watched: int,
        num_causes: int,
        handover_s: Sequence[float] = (),
        record: bool = False,
    ) -> None:
        self.programs = tuple(programs)
        self.gaps = [0.0] * num_causes
        self.busy = [0.0] * len(programs)
        self.last_end = 0.0
        self.spans: list[Span] | None = [] if record else None
        self._rates_of = rates
        self._watched = watched
        self._handover_s = tuple(handover_s) or (0.0,) * len(programs)
        self._num_classes = 1 + max((max(program.classes, default=0) for program in programs), default=0)
        self._rate_table: dict[int, tuple[float, ...]] = {}
        self._work: Sequence[float] = ()
        self._host_times: list[float] = []
        self._reset(0.0)

    def begin_step(self, now: float, work: Sequence[float]) -> None:
        """Start over at time `now` with these durations (seconds alone, by column)."""
        self._work = work
        self._host_times = []
        self.gaps = [0.0] * len(self.gaps)
        self.busy = [0.0] * len(self.busy)
        self._reset(now)

    def submit(self, time: float) -> None:
        """The launching thread's next submission is there to be seen at `time` (not before the last one)."""
        self._host_times.append(time)

    def _reset(self, now: float) -> None:
        lanes = len(self.programs)
        self.now = self.last_end = self._begin = now
        self._ends: list[list[float]] = [[] for _ in range(lanes)]
        self._finish = [NEVER] * lanes
        self._timed = [False] * lanes
        self._start = [now] * lanes
        self._current = [1.0] * lanes
        self._key = 0
        self._waits: list[tuple[tuple[int, float], ...]] = [()] * lanes

    def run_until(self, lane: int, count: int) -> float:
        """Advance until `lane` has completed `count` segments of this step; the time at which that happens.

        This loop is the simulator's inner loop (about five turns a layer), hence the local names.
        """
        finish, ends, timed, started_at = self._finish, self._ends, self._timed, self._start
        current, busy, programs = self._current, self.busy, self.programs
        now, key, base = self.now, self._key, self._num_classes
        candidates: Sequence[int] = range(len(programs))
        while True:
            begun = None
            for other in candidates:
                if finish[other] == NEVER and self._may_start(other, now):
                    key += programs[other].classes[len(ends[other])] * base**other
                    if begun is None:
                        begun = [other]
                    else:
                        begun.append(other)
            if key != self._key:
                self._change_rates(key, now)
            if begun is not None:
                for other in begun:
                    finish[other] = now + self._work[programs[other].columns[len(ends[other])]] / current[other]
            if len(ends[lane]) >= count:
                break
            now = min(finish)
            if now == NEVER:
                raise CloError(f"simulated deadlock: lane {lane} waits for segment {count}, nothing is in service")
            who = finish.index(now)
            finish[who] = NEVER
            if timed[who]:
                candidates = (who,)
                continue
            position = len(ends[who])
            program = programs[who]
            key -= program.classes[position] * base**who
            ends[who].append(now)
            busy[who] += now - started_at[who]
            if who == self._watched:
                self.last_end = now
            if self.spans is not None:
                self.spans.append(Span(who, position, started_at[who], now, self._waits[who]))
            candidates = (who, *program.wakes[position])
        self.now = now
        return now

    def _may_start(self, lane: int, now: float) -> bool:
        """Whether the lane's next segment can be in service from now on; arms a timer if an input is due later."""
        program, position = self.programs[lane], len(self._ends[lane])
        if position >= len(program.classes):
            return False
        ends = self._ends
        for other, count, _ in program.waits[position]:
            if len(ends[other]) < count:
                return False
        submissions, _ = program.host_waits[position]
        if submissions > len(self._host_times):
            return False
        later = self._handover_s[lane]
        due = self._host_times[submissions - 1] + later if submissions else now
        if later:
            due = max([due, *(ends[other][count - 1] + later for other, count, _ in program.waits[position])])
        if due > now:
            self._timed[lane] = True
            self._finish[lane] = due
            return False
        self._timed[lane] = False
        self._start[lane] = now
        if lane == self._watched or self.spans is not None:
            self._account(lane, program, position)
        return True

    def _account(self, lane: int, program: LaneProgram, position: int) -> None:
        """Inputs are waited for in their order: each gets what it took beyond the ones before it."""
        own = self._ends[lane]
        covered = own[-1] if own else self._begin
        waits: list[tuple[int, float]] = []
        for end, cause in self._inputs(lane, program, position):
            if end > covered:
                if lane == self._watched:
                    self.gaps[cause] += end - covered
                waits.append((cause, end - covered))
                covered = end
        self._waits[lane] = tuple(waits)

    def _inputs(self, lane: int, program: LaneProgram, position: int) -> list[tuple[float, int]]:
        """When the lane sees each input of a segment, its submission first, and the cause; all are there."""
        ends, later = self._ends, self._handover_s[lane]
        submissions, submitted = program.host_waits[position]
        inputs = [(self._host_times[submissions - 1] + later, submitted)] if submissions else []
        return inputs + [(ends[other][count - 1] + later, cause) for other, count, cause in program.waits[position]]

    def _change_rates(self, key: int, now: float) -> None:
        """Those in service go on at their new rates; what they have left takes longer or shorter."""
        rates = self._rate_table.get(key)
        if rates is None:
            rates = self._rate_table[key] = self._rates_of(self._classes_of(key))
        current, finish = self._current, self._finish
        for lane, rate in enumerate(rates):
            if current[lane] != rate:
                if finish[lane] != NEVER and not self._timed[lane]:
                    finish[lane] = now + (finish[lane] - now) * current[lane] / rate
                current[lane] = rate
        self._key = key

    def _classes_of(self, key: int) -> tuple[int, ...]:
        classes = []
        for _ in self.programs:
            key, lane_class = divmod(key, self._num_classes)
            classes.append(lane_class)
        return tuple(classes)
