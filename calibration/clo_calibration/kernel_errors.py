"""Command: fits the kernel tables of every GPU and prints how far off they are on held-out points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from clo.errors import CloError
from clo_calibration.tables.fit import FitReport, fit_tables
from clo_calibration.tables.measurements import GPUS


def errors(report: FitReport) -> str:
    """Median and 90th percentile on held-out points."""
    return f"{report.median:.1%} / {report.p90:.1%}"


def unsmoothed(report: FitReport) -> str:
    """The same before the table was made monotone."""
    known = report.baseline_median is not None
    return f"{report.baseline_median:.1%} / {report.baseline_p90:.1%}" if known else ""


def points(report: FitReport) -> str:
    """How many were fitted, and held out."""
    return f"{report.num_samples} / {report.num_held_out}"


def markdown(reports: Mapping[str, Sequence[FitReport]], cell: Callable[[FitReport], str]) -> str:
    """A row for each table, a column for each GPU; tables of which no GPU has a cell are left out."""
    cells = {gpu: {report.kernel: cell(report) for report in made} for gpu, made in reports.items()}
    kernels = dict.fromkeys(report.kernel for made in reports.values() for report in made)
    lines = [f"| Table | {' | '.join(reports)} |", "|---" * (len(reports) + 1) + "|"]
    for kernel in kernels:
        row = [cells[gpu].get(kernel, "") for gpu in reports]
        if any(row):
            lines.append(f"| {kernel} | {' | '.join(row)} |")
    return "\n".join(lines)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of aiconfigurator_core, if not installed.")
@click.option("--seed", default=0, show_default=True, help="Seed of the held-out split.")
@click.argument("gpus", nargs=-1, type=click.Choice(list(GPUS)))
def main(data: Path | None, seed: int, gpus: tuple[str, ...]) -> None:
    """Fit the tables (of all GPUs by default) and print their errors in markdown."""
    reports = {gpu: fit_tables(gpu, data, seed).report for gpu in gpus or GPUS}
    for title, cell in (("Errors", errors), ("Unsmoothed", unsmoothed), ("Points, fitted / held out", points)):
        click.echo(f"{title}:\n\n{markdown(reports, cell)}\n")


if __name__ == "__main__":
    try:
        main()
    except CloError as error:
        raise SystemExit(f"error: {error}") from None
