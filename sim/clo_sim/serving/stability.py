"""Whether a service keeps up with its load, from how its backlog moves while requests arrive. Knows no latencies.

A service that keeps up has a backlog that comes back; one that does not gathers, as long as requests come, the share
`1 - capacity / load` of them, so that every latency grows with the length of the run and says nothing. The number of
unfinished requests is averaged over `WINDOWS` equal parts of the time of arrivals (the first one, which starts empty,
is left out) and a straight line is fitted. It is unstable if the line rises by more than `MIN_SHARE` of the arrivals,
by more than the mean backlog (it trebles over the run), and its slope is beyond `MIN_T` standard errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOWS = 20
MIN_REQUESTS = 200
"""Fewer tell nothing about a trend."""
MIN_SHARE = 0.01
MIN_T = 4.0

Nanoseconds = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """`unstable` is none where there are too few requests to tell; `excess_share` of the load stays behind."""

    unstable: bool | None
    excess_share: float


def judge(arrival_ns: Nanoseconds, finish_ns: Nanoseconds) -> Stability:
    """From arrivals in order, and completions (past the end for those that never came), both of served requests."""
    if len(arrival_ns) < MIN_REQUESTS or arrival_ns[-1] == arrival_ns[0]:
        return Stability(unstable=None, excess_share=0.0)
    edges = np.linspace(arrival_ns[0], arrival_ns[-1], WINDOWS + 1)
    backlog = mean_in_system(arrival_ns, finish_ns, edges)
    slope, error = _trend(backlog[1:])
    rise = slope * (WINDOWS - 1)
    share = max(0.0, slope * WINDOWS / len(arrival_ns))
    grows = share > MIN_SHARE and rise > backlog[1:].mean() and slope > MIN_T * error
    return Stability(unstable=bool(grows), excess_share=share)


def mean_in_system(arrival_ns: Nanoseconds, finish_ns: Nanoseconds, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Time average of the number of unfinished requests between consecutive edges."""
    arrived, left = (_area_up_to(np.sort(stamps), edges) for stamps in (arrival_ns, finish_ns))
    return np.asarray(np.diff(arrived - left) / np.diff(edges))


def _area_up_to(stamps: Nanoseconds, times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral over time of how many stamps have passed, up to each of `times`."""
    count = np.searchsorted(stamps, times)
    sums = np.concatenate([[0.0], np.cumsum(stamps, dtype=np.float64)])
    return np.asarray(count * times - sums[count])


def _trend(values: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares slope a window, and its standard error."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(x @ values / (x @ x))
    residual = values - values.mean() - slope * x
    return slope, math.sqrt(float(residual @ residual) / (len(values) - 2) / float(x @ x))
