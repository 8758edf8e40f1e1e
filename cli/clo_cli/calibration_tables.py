"""What `clo calibrate` and `clo validate` print. Knows nothing about how it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from clo.units import US_PER_S
from clo_cli.tables import console

if TYPE_CHECKING:
    from clo.operation_costs import OperationProfile

QUIET = 0.1
"""A baseline that varies more between its repeats, or half of the microbenchmarks, had no quiet machine."""


def print_calibration(profile: OperationProfile) -> None:
    """Microbenchmarks, operations by their share, and how calm the machine was."""
    out = console()
    out.print(_benchmarks(profile))
    out.print(_operations(profile))
    woken = ", ".join(f"{lane} {seconds * US_PER_S:.0f} us" for lane, seconds in profile.handover_s.items())
    out.print(f"woken by another lane: {woken}")
    if profile.launch_hold_s:
        out.print("Lanes begin with what the launching thread has submitted once it blocks, not while it submits more.")
    out.print(f"spread of whole steps beyond that of their operations: {profile.common_spread:.1%}")
    apart = f"± {profile.drift:.1%}" if profile.drift else "not repeated often enough to say: take more --designs"
    out.print(f"the same run, minutes apart: {apart}")
    if not is_quiet(profile):
        out.print("Something else kept this machine busy: calibrate again when it is quiet, in another --samples.")


def is_quiet(profile: OperationProfile) -> bool:
    """Whether repeats agree: those of the baseline, minutes apart, and those of most microbenchmarks, one by one."""
    spreads = [row.spread for row in profile.benchmarks]
    return max(profile.drift, median(spreads) if spreads else 0.0) <= QUIET


def _benchmarks(profile: OperationProfile) -> Table:
    table = Table(title="Host", title_justify="left")
    for column in ("what", "parameters", "rate", "spread"):
        table.add_column(column, justify="left" if column in ("what", "parameters") else "right")
    for row in profile.benchmarks:
        parameters = ", ".join(f"{name} {value:g}" for name, value in row.parameters.items())
        table.add_row(row.name, parameters, f"{row.per_second:.3g} {row.unit}/s", f"± {row.spread:.0%}")
    return table


def _operations(profile: OperationProfile) -> Table:
    table = Table(title="Operations", title_justify="left")
    table.add_column("operation")
    for column in ("timed us", "spread", "slowed by others", "slows others", "samples"):
        table.add_column(column, justify="right")
    costs = profile.operations.items()
    for name, cost in sorted(costs, key=lambda item: -_typical_s(profile, item[0])):
        table.add_row(
            name,
            f"{_typical_s(profile, name) * US_PER_S:.0f}",
            f"± {cost.spread:.0%}",
            f"{1 + cost.slowed:.1f} x",
            f"{cost.host_share:.1f}",
            str(cost.samples),
        )
    return table


def _typical_s(profile: OperationProfile, name: str) -> float:
    points = profile.fits.get(name, ())
    return sum(point.measured_s for point in points) / len(points) if points else 0.0


def print_verdict(summary: Mapping[str, float], ablation: Mapping[str, float]) -> None:
    """The numbers that decide."""
    from clo_calibration.verdict import RESTLESS, is_restless, known

    out = console()
    out.print(
        f"error of TPOT: median {summary['tpot_error_median']:.1%}, 90th percentile {summary['tpot_error_p90']:.1%}, "
        f"worst {summary['tpot_error_worst']:.1%}, mean signed {summary['tpot_error_bias']:+.1%}"
    )
    if summary["unlike_runs"]:
        out.print(
            f"In {summary['unlike_runs']:.0%} of the runs the two worlds do not name the same operations in the same "
            "order with the same bytes: the verdict's text says which. Their times say nothing about costs."
        )
    out.print(
        f"designs: rank correlation {known(summary['rank_correlation'], '.2f')}, regret at most "
        f"{known(summary['regret'], '.1%')}; "
        f"{summary['interval_coverage']:.0%} of the real steps lie in their 90% intervals"
    )
    slower = summary["slower_than_calibrated"]
    how = "longer" if slower >= 0 else "less"
    out.print(
        f"the runs that costs were fitted from, repeated now, take {abs(slower):.1%} {how}: with every simulated step "
        f"changed by that the median error is {summary['tpot_error_median_at_this_speed']:.1%}"
    )
    if math.isfinite(summary["repeat_error_median"]):
        out.print(
            f"for comparison: foretold by their own steps at calibration, these runs are "
            f"{summary['repeat_error_median']:.1%} off in the median, {summary['repeat_error_p90']:.1%} at the 90th "
            "percentile"
        )
    if is_restless(summary):
        out.print(RESTLESS)
    parts = ", ".join(f"{name} {error:.1%}" for name, error in ablation.items() if name != "nothing")
    out.print(f"median error with a part of the simulator left out: {parts}")
