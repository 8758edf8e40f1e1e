"""What the bench measured, as records that become JSON and lines of a table. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
"""Version of the JSON's structure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Times of one operation in one case. A limit is a time too: no faster is expected (or wanted, if it is a goal)."""

    operation: str
    case: Mapping[str, str | int | float]
    samples_us: tuple[float, ...]
    num_bytes: float | None = None
    """Bytes that it must move, each counted once."""
    limit_us: float | None = None
    limit: str = ""
    """What the limit is and where it comes from."""

    @property
    def median_us(self) -> float:
        """Half of the samples took no longer."""
        return statistics.median(self.samples_us)

    @property
    def p90_us(self) -> float:
        """Nine in ten samples took no longer."""
        ordered = sorted(self.samples_us)
        return ordered[min(len(ordered) - 1, -(-9 * len(ordered) // 10) - 1)]

    @property
    def bytes_per_s(self) -> float | None:
        """At the median."""
        return None if self.num_bytes is None else self.num_bytes / self.median_us * 1e6

    @property
    def share_of_limit(self) -> float | None:
        """1: as fast as the limit."""
        return None if self.limit_us is None else self.limit_us / self.median_us

    def as_json(self) -> dict[str, Any]:
        """Summary and raw samples."""
        return {
            "operation": self.operation,
            "case": dict(self.case),
            "median_us": self.median_us,
            "min_us": min(self.samples_us),
            "p90_us": self.p90_us,
            "num_bytes": self.num_bytes,
            "bytes_per_s": self.bytes_per_s,
            "limit_us": self.limit_us,
            "limit": self.limit,
            "share_of_limit": self.share_of_limit,
            "samples_us": list(self.samples_us),
        }

    def line(self) -> str:
        """One line of the table."""
        case = " ".join(f"{name}={value}" for name, value in self.case.items())
        rate = f"{self.bytes_per_s / 1e9:8.1f} GB/s" if self.bytes_per_s is not None else " " * 13
        limit = f"{self.share_of_limit:5.0%} of {self.limit_us:.1f} us: {self.limit}" if self.share_of_limit else "-"
        times = f"{self.median_us:10.2f} us  min {min(self.samples_us):10.2f}  p90 {self.p90_us:10.2f}"
        return f"{self.operation:32} {case:46} {times} {rate}  {limit}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an operation's results were those of its reference."""

    operation: str
    case: str
    passed: bool
    detail: str = ""


@dataclass(slots=True)
class Report:
    """Everything of one run, filled in section by section."""

    environment: Mapping[str, Any]
    quick: bool
    note: str
    correctness: list[Verdict] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    kernels: list[Mapping[str, Any]] = field(default_factory=list)
    goals: list[Mapping[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Sections that failed or for which no time was left, each with the reason."""

    failed: list[str] = field(default_factory=list)
    """Sections that broke off with an error."""

    @property
    def failed_operations(self) -> frozenset[str]:
        """Operations that have no right to a figure."""
        return frozenset(verdict.operation for verdict in self.correctness if not verdict.passed)

    def as_json(self) -> dict[str, Any]:
        """The whole file."""
        return {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "quick": self.quick,
            "note": self.note,
            "correctness": [
                {"operation": v.operation, "case": v.case, "passed": v.passed, "detail": v.detail}
                for v in self.correctness
            ],
            "kernels": [dict(kernel) for kernel in self.kernels],
            "goals": [dict(goal) for goal in self.goals],
            "figures": [figure.as_json() for figure in self.figures],
            "left_out": list(self.left_out),
            "failed": list(self.failed),
        }


def scaled(samples_us: Sequence[float], calls: int) -> tuple[float, ...]:
    """Times of one call, where a sample is that of `calls` of them."""
    return tuple(sample / calls for sample in samples_us)
