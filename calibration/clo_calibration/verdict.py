"""How far a simulation can be trusted on a machine: the record, its summary and its text. Knows nothing about runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import field_validator
from scipy.stats import spearmanr

from clo.specs.base import Spec, check_version

SCHEMA_VERSION = 2


class Pair(Spec):
    """A number in both worlds, seconds."""

    real_s: float
    simulated_s: float


class Point(Spec):
    """One design at one size: the median step, and what became of it in simulation."""

    design: str
    context_tokens: int
    batch: int
    budget_fraction: float
    fitted: bool
    real_s: float
    calibrated_s: float | None = None
    disturbed_s: float
    simulated_s: float
    low_s: float
    high_s: float
    hit_rate: float
    differences: tuple[str, ...]
    without: dict[str, float]
    operations: dict[str, Pair]
    lanes: dict[str, Pair]
    stalls: dict[str, Pair]

    @property
    def error(self) -> float:
        """Signed relative error of TPOT."""
        return self.simulated_s / self.real_s - 1.0

    @property
    def is_covered(self) -> bool:
        """Whether the prediction interval holds the real step."""
        return self.low_s <= self.real_s <= self.high_s

    @property
    def group(self) -> tuple[int, int, float]:
        """Designs are compared at the same size."""
        return self.context_tokens, self.batch, self.budget_fraction


class Verdict(Spec):
    """All points of a machine. Summaries are over the points nothing was fitted from, unless there are none."""

    schema_version: int = SCHEMA_VERSION
    profile: str
    machine: str
    model: str
    date: str
    fingerprint: dict[str, str]
    drift: float
    rounds: int
    calibrated_rounds: int
    points: tuple[Point, ...]

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: int) -> int:
        return check_version(value, SCHEMA_VERSION, "verdict")

    @property
    def judged(self) -> tuple[Point, ...]:
        """The held-out points."""
        return tuple(point for point in self.points if not point.fitted) or self.points

    def summary(self) -> dict[str, float]:
        """The numbers that decide, each a share: errors of TPOT, order of designs, regret, coverage."""
        errors = np.abs([point.error for point in self.judged])
        return {
            "tpot_error_median": float(np.median(errors)),
            "tpot_error_p90": float(np.percentile(errors, 90)),
            "tpot_error_worst": float(errors.max()),
            "tpot_error_bias": float(np.mean([point.error for point in self.judged])),
            "rank_correlation": self.rank_correlation(),
            "regret": max((_regret(group) for group in self.groups()), default=math.nan),
            "interval_coverage": float(np.mean([point.is_covered for point in self.judged])),
            "slower_than_calibrated": self.slower_than_calibrated(),
            "tpot_error_median_at_this_speed": self.error_at_this_speed(),
            "repeat_error_median": self.repeat_error(50),
            "repeat_error_p90": self.repeat_error(90),
            "disturbance": float(np.median([point.disturbed_s / point.real_s - 1.0 for point in self.points])),
        }

    def rank_correlation(self) -> float:
        """Mean over the sizes; NaN where no designs can be told apart."""
        found = [_rank_correlation(group) for group in self.groups()]
        known = [value for value in found if math.isfinite(value)]
        return float(np.mean(known)) if known else math.nan

    def slower_than_calibrated(self) -> float:
        """How much longer the very runs take now from which costs were fitted: what no simulation could foresee."""
        again = [point.real_s / point.calibrated_s - 1.0 for point in self.points if point.calibrated_s]
        return float(np.median(again)) if again else 0.0

    def error_at_this_speed(self) -> float:
        """Median |error| of TPOT with all simulated steps longer by as much as the fitted runs are now.

        What is left is the model's own; the difference is the machine's, which was not the same at both times.
        """
        speed = 1.0 + self.slower_than_calibrated()
        return float(np.median([abs(speed * point.simulated_s / point.real_s - 1.0) for point in self.judged]))

    def repeat_error(self, percentile: float) -> float:
        """|Error| of TPOT if a real run foretold its own repetition: fitted runs, at calibration and now. NaN if none.

        The yardstick: what the machine itself does not repeat, no model can know.
        """
        errors = [abs(point.calibrated_s / point.real_s - 1.0) for point in self.points if point.calibrated_s]
        return float(np.percentile(errors, percentile)) if errors else math.nan

    def groups(self) -> list[list[Point]]:
        """Judged points of one size, where designs can be chosen among."""
        groups: dict[tuple[int, int, float], list[Point]] = {}
        for point in self.judged:
            groups.setdefault(point.group, []).append(point)
        return [group for group in groups.values() if len(group) > 1]

    def ablation(self) -> dict[str, float]:
        """Median |error| of TPOT when a part of the model is left out, over the judged points."""
        names = self.judged[0].without
        return {
            name: float(np.median([abs(point.without[name] / point.real_s - 1.0) for point in self.judged]))
            for name in names
        }

    def totals(self, field: str) -> dict[str, Pair]:
        """Operations, lanes or stalls summed over the judged points, seconds a step."""
        sums: dict[str, list[float]] = {}
        for point in self.judged:
            pairs: dict[str, Pair] = getattr(point, field)
            for name, pair in pairs.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += pair.real_s
                total[1] += pair.simulated_s
        return {name: Pair(real_s=real, simulated_s=simulated) for name, (real, simulated) in sums.items()}


def _rank_correlation(points: Sequence[Point]) -> float:
    """NaN where all are equal."""
    if any(len(set(seconds)) < 2 for seconds in zip(*((p.real_s, p.simulated_s) for p in points), strict=True)):
        return math.nan
    return float(spearmanr([point.real_s for point in points], [point.simulated_s for point in points]).statistic)


def _regret(points: Sequence[Point]) -> float:
    """How much slower the design that the simulation would choose is than the fastest."""
    chosen = min(points, key=lambda point: point.simulated_s)
    return chosen.real_s / min(point.real_s for point in points) - 1.0


def _rounds(verdict: Verdict) -> str:
    said = f"A step counts as the fastest of {verdict.rounds} rounds, which decoded the same"
    if verdict.rounds == verdict.calibrated_rounds:
        return f"{said}, here as in the calibration."
    return f"{said}; costs were fitted to the fastest of {verdict.calibrated_rounds}: more rounds find faster steps."


def markdown(verdict: Verdict) -> str:
    """The verdict for people."""
    held = sum(not point.fitted for point in verdict.points)
    summary = verdict.summary()
    lines = [
        f"# Simulation against {verdict.machine}",
        "",
        f"{verdict.date}, profile `{verdict.profile}`, model {verdict.model} with random weights. "
        + ", ".join(f"{name} {value}" for name, value in verdict.fingerprint.items())
        + ".",
        "",
        _judged(len(verdict.points), held),
        "",
        "| | |",
        "|---|---|",
        f"| median error of TPOT | {summary['tpot_error_median']:.1%} |",
        f"| 90th percentile | {summary['tpot_error_p90']:.1%} |",
        f"| worst | {summary['tpot_error_worst']:.1%} |",
        f"| mean signed error | {summary['tpot_error_bias']:+.1%} |",
        f"| rank correlation of designs | {summary['rank_correlation']:.2f} |",
        f"| regret of the simulation's choice, worst size | {summary['regret']:.1%} |",
        f"| real steps inside their 90% intervals | {summary['interval_coverage']:.0%} |",
        f"| the fitted runs, repeated now, take longer by | {summary['slower_than_calibrated']:+.1%} |",
        f"| median error of TPOT with every simulated step longer by that | "
        f"{summary['tpot_error_median_at_this_speed']:.1%} |",
        *_repeated(summary),
        f"| baseline, minutes apart | ± {verdict.drift:.1%} |",
        f"| disturbed by others: a typical round against the fastest | +{summary['disturbance']:.1%} |",
        "",
        _rounds(verdict),
        "",
        "## What each part of the simulator earns",
        "",
        "| Left out | median error of TPOT |",
        "|---|---|",
        *(f"| {name} | {error:.1%} |" for name, error in verdict.ablation().items()),
        "",
        "## Where time goes in both worlds, summed over these runs",
        "",
        *_table("Lane", verdict.totals("lanes")),
        "",
        *_table("Stall of the main stream", verdict.totals("stalls")),
        "",
        *_table("Operation", verdict.totals("operations")),
        "",
        "## Runs",
        "",
        "| design | context | batch | budget | fitted | real ms | simulated ms | error | interval ms | hit rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(point) for point in verdict.points),
        "",
    ]
    return "\n".join(lines)


def _repeated(summary: dict[str, float]) -> list[str]:
    median, p90 = summary["repeat_error_median"], summary["repeat_error_p90"]
    if math.isnan(median):
        return []
    what = "for comparison: the fitted runs foretold by themselves, median; 90th percentile"
    return [f"| {what} | {median:.1%}; {p90:.1%} |"]


def _judged(count: int, held: int) -> str:
    if not held:
        return f"{count} runs, all at sizes that costs were fitted at."
    return f"{count} runs. The numbers are over the {held} at sizes or with choices that nothing was fitted from."


def _table(what: str, pairs: dict[str, Pair]) -> list[str]:
    ordered = sorted(pairs.items(), key=lambda item: -item[1].real_s)
    return [
        f"| {what} | real ms | simulated ms | error |",
        "|---|---|---|---|",
        *(
            f"| {name} | {1e3 * pair.real_s:.2f} | {1e3 * pair.simulated_s:.2f} | {_relative(pair)} |"
            for name, pair in ordered
        ),
    ]


def _relative(pair: Pair) -> str:
    return f"{pair.simulated_s / pair.real_s - 1:+.0%}" if pair.real_s > 0 else "-"


def _row(point: Point) -> str:
    inside = "" if point.is_covered else " (outside)"
    return (
        f"| {point.design} | {point.context_tokens} | {point.batch} | {point.budget_fraction:.0%} "
        f"| {'yes' if point.fitted else 'no'} | {1e3 * point.real_s:.1f} | {1e3 * point.simulated_s:.1f} "
        f"| {point.error:+.1%} | {1e3 * point.low_s:.1f} to {1e3 * point.high_s:.1f}{inside} | {point.hit_rate:.0%} |"
    )
