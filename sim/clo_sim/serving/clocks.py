"""How long decode steps take as the sequences of a batch grow, in whole nanoseconds. Knows nothing about requests.

A clock belongs to one batch size. Its argument is the mean context of the batch, rounded down: every sequence grows by
a token a step, so the mean grows by exactly one, whatever the lengths. Step times are constant within a bucket of
contexts, and their sums are kept: `k` steps at once take, to the nanosecond, what they take one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True, eq=False)
class StepClock:
    """`steps[i]` is the time of a step at contexts `[i, i + 1) << shift`, ns; contexts past the end take the last.

    `starts[i]` is what the steps at all contexts below that bucket take together.
    """

    shift: int
    steps: Sequence[int]
    starts: Sequence[int]

    @classmethod
    def of(cls, steps: Sequence[int], *, shift: int) -> StepClock:
        """From step times; none is shorter than a nanosecond, so that time always moves on."""
        whole = [max(1, step) for step in steps]
        return cls(shift, whole, [0, *accumulate(step << shift for step in whole[:-1])])

    def until(self, context: int) -> int:
        """What the steps at all contexts below this one take together."""
        bucket = min(context >> self.shift, len(self.steps) - 1)
        return self.starts[bucket] + (context - (bucket << self.shift)) * self.steps[bucket]

    def total(self, context: int, count: int) -> int:
        """Time of `count` steps, the first at `context`."""
        return self.until(context + count) - self.until(context)

    def steps_to_pass(self, context: int, nanoseconds: int) -> int:
        """The fewest steps, at least one, that take `nanoseconds` or more."""
        target = self.until(context) + nanoseconds
        bucket = bisect_right(self.starts, target) - 1
        over = target - self.starts[bucket]
        reached = (bucket << self.shift) - (-over // self.steps[bucket])
        return max(1, reached - context)

    def pieces(self, context: int, count: int) -> Iterator[tuple[int, int]]:
        """(step time, how many) of `count` steps, bucket by bucket."""
        last = len(self.steps) - 1
        while count > 0:
            bucket = min(context >> self.shift, last)
            taken = count if bucket == last else min(count, ((bucket + 1) << self.shift) - context)
            yield self.steps[bucket], taken
            context += taken
            count -= taken
