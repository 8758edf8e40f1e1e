"""States of a worker at evenly spaced moments, whatever happens then. Knows nothing about what the states are of."""

from __future__ import annotations

from clo_sim.serving.records import Sample

MOST_SAMPLES = 800
"""States kept of a worker."""


class Sampler:
    """Appends to `samples`, which starts empty; `next_ns` is the moment of the next one."""

    __slots__ = ("_every_ns", "_samples", "next_ns")

    def __init__(self, samples: list[Sample], every_ns: int) -> None:
        self._samples, self._every_ns, self.next_ns = samples, every_ns, every_ns

    def keep(self, sample: Sample) -> None:
        """The state at `next_ns`."""
        self._samples.append(sample)
        self.next_ns += self._every_ns
        if len(self._samples) == MOST_SAMPLES:
            self._thin()

    def _thin(self) -> None:
        """Keep every other one, and from now on half as many: runs may be much longer than their arrivals."""
        del self._samples[::2]
        self._every_ns *= 2
        self.next_ns = self._samples[-1].now_ns + self._every_ns

    def count_arrival(self, arrival_ns: int) -> None:
        """Samples of an iteration that was under way when a request arrived were taken without it."""
        samples, place = self._samples, len(self._samples) - 1
        while place >= 0 and samples[place].now_ns >= arrival_ns:
            samples[place] = samples[place]._replace(waiting=samples[place].waiting + 1)
            place -= 1
