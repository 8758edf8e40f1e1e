"""Service level objectives: `ttft_p95<2s, tpot_p95<50ms`. Knows nothing about how latencies came about."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from clo.errors import RequestError
from clo.units import format_seconds

Metric = Literal["ttft", "tpot", "itl", "e2e"]

_TERM = re.compile(
    r"\s*(?P<metric>[a-z0-9]+)_(?P<statistic>p\d{1,2}(?:\.\d+)?|mean|max)\s*<=?\s*(?P<limit>\S+(?: +\S+)?)\s*$"
)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_LIMIT = re.compile(r"(?P<number>[0-9.eE+-]+?) *(?P<unit>s|ms|us|min)$")


@dataclass(frozen=True, slots=True)
class Term:
    """`metric_statistic < limit_s`; the statistic is `mean`, `max` or a percentile such as `p95`."""

    metric: Metric
    statistic: str
    limit_s: float

    @property
    def name(self) -> str:
        """As reports call it: `ttft_p95`."""
        return f"{self.metric}_{self.statistic}"

    @property
    def quantile(self) -> float | None:
        """The share of values that must be below the limit; none for a mean."""
        if self.statistic == "mean":
            return None
        return 1.0 if self.statistic == "max" else float(self.statistic[1:]) / 100

    def __str__(self) -> str:
        return f"{self.name}<{format_seconds(self.limit_s).replace(' ', '')}"


@dataclass(frozen=True, slots=True)
class Slo:
    """Terms that must all hold."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return ", ".join(str(term) for term in self.terms)

    def limit_s(self, metric: Metric) -> float:
        """The strictest limit on a metric, whatever the statistic; infinite without one. What goodput asks of each."""
        return min((term.limit_s for term in self.terms if term.metric == metric), default=math.inf)


def parse_slo(text: str) -> Slo:
    """Read comma-separated terms. Raises `RequestError` naming the term and the rule."""
    terms = tuple(_term(part) for part in text.split(",") if part.strip())
    if not terms:
        raise RequestError(f"--slo {text!r}: needs a term such as ttft_p95<2s")
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RequestError(f"--slo {text!r}: {twice} is limited twice")
    return Slo(terms)


def _term(text: str) -> Term:
    found = _TERM.match(text)
    if found is None or found["metric"] not in get_args(Metric):
        metrics = ", ".join(get_args(Metric))
        raise RequestError(
            f"--slo {text.strip()!r}: expected METRIC_pNN<LIMIT (or _mean, _max) with METRIC of {metrics}"
        )
    if found["statistic"] == "p0":
        raise RequestError(f"--slo {text.strip()!r}: no value is below p0: take p50, p95, p99, mean or max")
    limit = _LIMIT.match(found["limit"])
    try:
        seconds = float(limit["number"]) * _SECONDS[limit["unit"]] if limit else math.nan
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise RequestError(
            f"--slo {text.strip()!r}: the limit must be a positive time with its unit, such as 2s or 50ms"
        )
    return Term(cast(Metric, found["metric"]), found["statistic"], seconds)
