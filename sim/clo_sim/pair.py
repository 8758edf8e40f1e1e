"""Two lanes in fluid service whose work is all submitted at once: the common case (a graph), much faster.

The same rules as `clo_sim.device`, which a test holds it to; there is nothing here that the general device cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clo.errors import CloError
from clo_sim.device import NEVER, LaneProgram, Rates

STUCK = "simulated deadlock: both lanes wait for each other"


@dataclass(slots=True)
class PairOutcome:
    """What a step did: last completion on the watched lane, busy time of both lanes, gaps of the watched by cause."""

    end: float
    busy: tuple[float, float]
    gaps: list[float]


class LanePair:
    """A watched lane and another one, with the number of the other's completions that each segment needs."""

    def __init__(self, watched: LaneProgram, other: LaneProgram, rates: Rates, num_causes: int) -> None:
        self._programs = (watched, other)
        self._needs = tuple([_needed(waits) for waits in program.waits] for program in (watched, other))
        self._causes = [waits[-1][2] if waits else 0 for waits in watched.waits]
        submissions, submitted = watched.host_waits[0]
        self._start_cause = submitted if submissions else self._causes[0]
        self._num_causes = num_causes
        num_classes = 1 + max((*watched.classes, *other.classes), default=0)
        self._table = [[rates((mine, theirs)) for theirs in range(num_classes)] for mine in range(num_classes)]

    def run(self, begin: float, work: Sequence[float]) -> PairOutcome:
        """Serve both lanes from `begin` until they are done; `work` is the step's row of durations."""
        watched, other = self._programs
        needs_a, needs_b = self._needs
        classes_a, classes_b = watched.classes, other.classes
        work_a = [work[column] for column in watched.columns]
        work_b = [work[column] for column in other.columns]
        count_a, count_b = len(work_a), len(work_b)
        table, causes = self._table, self._causes
        gaps = [0.0] * self._num_causes
        done_a = done_b = class_a = class_b = 0
        rate_a = rate_b = 1.0
        finish_a = finish_b = NEVER
        busy_b = start_b = 0.0
        last_a = now = begin
        gap_total = 0.0
        while True:
            starts_a = finish_a == NEVER and done_a < count_a and needs_a[done_a] <= done_b
            starts_b = finish_b == NEVER and done_b < count_b and needs_b[done_b] <= done_a
            if starts_a:
                class_a = classes_a[done_a]
                if now > last_a:
                    gaps[causes[done_a]] += now - last_a
                    gap_total += now - last_a
            if starts_b:
                class_b = classes_b[done_b]
                start_b = now
            new_a, new_b = table[class_a][class_b]
            if starts_a:
                finish_a = now + work_a[done_a] / new_a
            elif new_a != rate_a and finish_a != NEVER:
                finish_a = now + (finish_a - now) * rate_a / new_a
            if starts_b:
                finish_b = now + work_b[done_b] / new_b
            elif new_b != rate_b and finish_b != NEVER:
                finish_b = now + (finish_b - now) * rate_b / new_b
            rate_a, rate_b = new_a, new_b
            if finish_a <= finish_b:
                if finish_a == NEVER:
                    break
                now = last_a = finish_a
                finish_a = NEVER
                done_a += 1
                class_a = 0
            else:
                now = finish_b
                finish_b = NEVER
                done_b += 1
                class_b = 0
                busy_b += now - start_b
        if done_a < count_a or done_b < count_b:
            raise CloError(STUCK)
        gaps[self._start_cause] += begin
        return PairOutcome(last_a, (last_a - begin - gap_total, busy_b), gaps)


def _needed(waits: tuple[tuple[int, int, int], ...]) -> int:
    return max((count for _, count, _ in waits), default=0)
