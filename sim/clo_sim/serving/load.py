"""Generated arrivals: Poisson, bursty and fixed, over lengths that are given or drawn from a trace.

Knows nothing about files or machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clo.errors import RequestError
from clo_sim.serving.requests import NS_PER_S, Request, RequestTrace

Arrivals = Literal["poisson", "bursty", "fixed"]
Lengths = Sequence[tuple[int, int]]
"""Pairs of prompt and answer tokens to draw from."""

BURSTY_SQUARED_VARIATION = 10.0
"""Squared coefficient of variation of the gaps of a bursty load (Poisson: 1, fixed: 0)."""


def generate(
    arrivals: Arrivals,
    *,
    rate_per_s: float,
    num_requests: int,
    lengths: Lengths,
    seed: int = 0,
) -> RequestTrace:
    """`num_requests` at a mean of `rate_per_s`; lengths are drawn with replacement. Same seed, same load.

    Gaps between arrivals are exponential (`poisson`), gamma with a squared variation of 10 (`bursty`), or all equal.
    Raises `RequestError` for an unknown kind, a rate or a number that is not positive, or no lengths.
    """
    if arrivals not in get_args(Arrivals):
        raise RequestError(f"load {arrivals!r}: must be one of {', '.join(get_args(Arrivals))}")
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)):
        raise RequestError(f"load rate = {rate_per_s:g} requests/s: must be positive and finite")
    if num_requests < 1 or not lengths:
        raise RequestError(
            f"load of {num_requests} requests with {len(lengths)} lengths to draw from: needs one of each"
        )
    rng = np.random.default_rng(seed)
    times = np.concatenate([[0.0], np.cumsum(_gaps(rng, arrivals, num_requests - 1))]) / rate_per_s
    if not math.isfinite(float(times[-1]) * NS_PER_S):
        raise RequestError(f"load rate = {rate_per_s:g} requests/s: the last of {num_requests} would never come")
    drawn = rng.integers(0, len(lengths), size=num_requests)
    requests = tuple(
        Request(round(time * NS_PER_S), *lengths[number])
        for time, number in zip(times.tolist(), drawn.tolist(), strict=True)
    )
    return RequestTrace(f"{arrivals} {rate_per_s:g}/s", requests)


def lengths_of(trace: RequestTrace) -> list[tuple[int, int]]:
    """Prompt and answer tokens of every request of a trace."""
    return [(request.input_tokens, request.output_tokens) for request in trace.requests]


def _gaps(rng: np.random.Generator, arrivals: Arrivals, count: int) -> NDArray[np.float64]:
    """Gaps of mean 1."""
    if arrivals == "fixed":
        return np.ones(count)
    if arrivals == "poisson":
        return rng.exponential(size=count)
    return rng.gamma(1 / BURSTY_SQUARED_VARIATION, BURSTY_SQUARED_VARIATION, size=count)
