"""Command: fits the kernel tables of every GPU and prints their errors on held-out points."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clo.errors import ProfileError
from clo_calibration.tables.fit import FitReport, FittedTables, fit_tables
from clo_calibration.tables.measurements import GPUS, systems_folder


def to_json(fitted: FittedTables) -> str:
    """The tables as one JSON object, by their names in a profile."""
    data = {name: table.model_dump(mode="json") for name, table in fitted.tables.items()}
    return json.dumps(data, separators=(",", ":")) + "\n"


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, write `<out>/<gpu>.json`, and print the errors as markdown tables."""
    parser = argparse.ArgumentParser(description="Fit GPU kernel tables to the measurements of aiconfigurator-core.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write <gpu>.json to")
    parser.add_argument("--data", type=Path, default=None, help="folder of an unpacked aiconfigurator_core")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out split")
    parser.add_argument("--gpu", choices=list(GPUS), action="append", help="only these (default: all)")
    options = parser.parse_args(arguments)
    try:
        systems_folder(options.data)
    except ProfileError as error:
        parser.exit(1, f"{error}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    reports: dict[str, Sequence[FitReport]] = {}
    for gpu in options.gpu or GPUS:
        fitted = fit_tables(gpu, options.data, options.seed)
        (options.out / f"{gpu}.json").write_text(to_json(fitted), encoding="utf-8")
        reports[gpu] = fitted.report
    for title, cell in (("Errors", errors), ("Unsmoothed", unsmoothed), ("Points, fitted / held out", points)):
        print(f"{title}:\n\n{markdown(reports, cell)}\n")


if __name__ == "__main__":
    main()
