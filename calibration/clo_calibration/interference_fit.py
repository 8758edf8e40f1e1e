"""How operations slow each other, from decode steps in which they ran side by side.

The rule is the simulator's (`clo_sim.contention`): beside others whose shares add up to g, an operation that is slowed
by s runs at the rate 1 / (1 + s g). Knows nothing about how steps were run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from clo.operation_costs import OperationCost
from clo_calibration.operation_fit import Observation, Timed, predicted_s, undisturbed

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interference:
    """By price: how much other lanes slow it, how much it slows them, and how lanes differ from running alone."""

    slowed: dict[str, float]
    host_share: dict[str, float]
    lane_factor: dict[str, float]


PRIOR = {"slowed": (1.0, 1.0), "host_share": (1.0, 0.7), "lane_factor": (1.0, 0.1)}
"""Median and relative width of what is expected before any overlap was seen, log-normal."""

NOISE = 0.05
"""Relative error of one run of one operation, against which the priors are weighed."""

FAIR, UNFAIR = 1.0, 0.3
"""Growth of an operation beside one other that shares evenly with it; and how sure it is that no pair exceeds that.

Products s g of pairs that were never seen together follow from what was seen of either with others; without a limit a
pair that meets in the simulator alone may come to a halt.
"""

_PRIOR_LOGS = np.log([[PRIOR[name][0]] for name in ("slowed", "host_share", "lane_factor")])
_PRIOR_WIDTHS = np.array([[PRIOR[name][1]] for name in ("slowed", "host_share", "lane_factor")])


def fit_interference(beside: dict[str, Timed], costs: dict[str, OperationCost]) -> Interference:
    """From operations that ran beside others.

    The rate of an operation over its time adds up to the work there was: its time alone, times a factor near 1 for
    running on a lane. One equation for each operation and run, least squares, with log-normal priors.
    """
    keys = sorted(key for key, timed in beside.items() if key in costs and not timed.rows[0].is_runtime)
    if not keys:
        return Interference({}, {}, {})
    seen = _Seen.of(beside, costs, keys)

    def errors(logs: Floats) -> Floats:
        slowed, share, factor = np.exp(logs.reshape(3, -1))
        rates = 1.0 / (1.0 + slowed[seen.who[seen.row]] * (seen.others @ share))
        work = seen.undisturbed + np.bincount(seen.row, seen.seconds * rates, minlength=len(seen.who))
        fits = (work / (factor[seen.who] * seen.alone) - 1.0) / NOISE
        growth = logs.reshape(3, -1)[0][:, None] + logs.reshape(3, -1)[1]
        unfair = np.maximum(0.0, growth - np.log(FAIR)) / UNFAIR
        priors = (logs.reshape(3, -1) - _PRIOR_LOGS) / _PRIOR_WIDTHS
        return np.concatenate([fits, unfair.ravel(), priors.ravel()])

    start = np.repeat(_PRIOR_LOGS, len(keys), axis=1).ravel()
    found = np.exp(least_squares(errors, start, loss="soft_l1").x.reshape(3, -1))
    return Interference(*(dict(zip(keys, values.tolist(), strict=True)) for values in found))


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """Rows: one operation in one run. Pieces: the time of a row beside one group of others. Seconds."""

    who: NDArray[np.int64]
    alone: Floats
    undisturbed: Floats
    row: NDArray[np.int64]
    seconds: Floats
    others: Floats

    @classmethod
    def of(cls, beside: dict[str, Timed], costs: dict[str, OperationCost], keys: Sequence[str]) -> _Seen:
        number = {key: at for at, key in enumerate(keys)}
        rows = [
            (number[key], _total(found, costs[key].per_unit, number))
            for key in keys
            for found in beside[key].per_run().values()
        ]
        rows = [(who, total) for who, total in rows if total.alone > 0]
        pieces = [(at, piece) for at, (_, total) in enumerate(rows) for piece in total.beside.items()]
        others = np.zeros((len(pieces), len(keys)))
        for at, (_, (group, _)) in enumerate(pieces):
            np.add.at(others[at], list(group), 1.0)
        return cls(
            who=np.array([who for who, _ in rows]),
            alone=np.array([total.alone for _, total in rows]),
            undisturbed=np.array([total.undisturbed for _, total in rows]),
            row=np.array([at for at, _ in pieces], dtype=np.int64),
            seconds=np.array([seconds for _, (_, seconds) in pieces]),
            others=others,
        )


@dataclass(frozen=True, slots=True)
class _Total:
    """One operation in one run, seconds: as alone, undisturbed, and beside each group of others, by their numbers."""

    alone: float
    undisturbed: float
    beside: dict[tuple[int, ...], float]


def _total(rows: Sequence[Observation], per_unit: dict[str, float], number: dict[str, int]) -> _Total:
    kept = undisturbed(rows, per_unit)
    beside: dict[tuple[int, ...], float] = {}
    for row in kept:
        for group, share in row.beside.items():
            # what is never slowed and slows nothing is as good as absent
            if known := tuple(number[key] for key in group if key in number):
                beside[known] = beside.get(known, 0.0) + row.seconds * share
    seconds = sum(row.seconds for row in kept)
    return _Total(sum(predicted_s(row, per_unit) for row in kept), seconds - sum(beside.values()), beside)
