"""What is wanted: metrics to improve and bounds to keep. Ranks evaluations; knows nothing about how they came about."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clo.errors import SpecError
from clo_sim.evaluation import METRICS, Evaluation

LARGER_IS_BETTER = frozenset(
    {"tokens_per_s", "gpu_tokens_per_s", "overlap", "hit_rate", "reuse_rate", "measured_share"}
)
"""Metrics that are maximised; all others are minimised."""

_BOUND = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Bound:
    """`metric >= value` if `least`, else `metric <= value`."""

    metric: str
    value: float
    least: bool

    @classmethod
    def parse(cls, text: str) -> Bound:
        """`"overlap>=0.9"`, `"device_bytes<=100e9"`. Raises `SpecError` that names the text and the rule."""
        match = _BOUND.fullmatch(text)
        if match is None:
            raise SpecError(f"{text!r}: expected METRIC>=VALUE or METRIC<=VALUE, e.g. overlap>=0.9")
        name, sign, number = match.groups()
        metric, value = check_metric(name), _number(number)
        if math.isnan(value):
            raise SpecError(f"{text!r}: {number} is no number")
        return cls(metric, value, sign == ">=")

    def excess(self, one: Evaluation) -> float:
        """How far an evaluation breaks the bound, as a share of it; 0 or less: it keeps it."""
        over = one.metrics[self.metric] - self.value
        return (-over if self.least else over) / (abs(self.value) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.least else '<='}{self.value:g}"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """Metrics to improve, the first counting most when one design must be named, and bounds that all must keep."""

    objectives: tuple[str, ...] = ("tpot_s",)
    bounds: tuple[Bound, ...] = ()

    def costs(self, one: Evaluation) -> tuple[float, ...]:
        """The objectives, each so that less is better."""
        return tuple(cost_of(one, name) for name in self.objectives)

    def allows(self, one: Evaluation) -> bool:
        """Whether a design runs and keeps every bound."""
        return one.runs and all(bound.excess(one) <= 0 for bound in self.bounds)

    def ranked(self, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
        """What is allowed, best first: front by front, within a front by the first objective; ties keep their order."""
        rest = sorted((one for one in evaluations if self.allows(one)), key=self.costs)
        ranked: list[Evaluation] = []
        while rest:
            ahead = self._undominated(rest)
            ranked += ahead
            taken = {id(one) for one in ahead}
            rest = [one for one in rest if id(one) not in taken]
        return ranked

    def front(self, evaluations: Iterable[Evaluation]) -> list[Evaluation]:
        """What is allowed and not worse than another in one objective without being better in some other."""
        return self._undominated(sorted((one for one in evaluations if self.allows(one)), key=self.costs))

    def _undominated(self, by_cost: Sequence[Evaluation]) -> list[Evaluation]:
        front: list[tuple[float, ...]] = []
        kept: list[Evaluation] = []
        for one in by_cost:
            costs = self.costs(one)
            # sorted by cost: only those before can be as good in everything; of equals the first stands for all
            if not any(all(a <= b for a, b in zip(other, costs, strict=True)) for other in front):
                front.append(costs)
                kept.append(one)
        return kept


def cost_of(one: Evaluation, metric: str) -> float:
    """A metric so that less is better."""
    return -one.metrics[metric] if metric in LARGER_IS_BETTER else one.metrics[metric]


def check_metric(name: str) -> str:
    """`name` if it is a metric. Raises `SpecError` with what is known."""
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(METRICS)}"
        raise SpecError(f"metric {name!r} is unknown ({hint})")
    return name
