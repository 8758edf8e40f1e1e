"""Command: fits the kernel tables of every GPU and prints their errors on held-out points."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from clo.errors import ProfileError
from clo_calibration.tables.fit import FitReport, FittedTables, fit_tables
from clo_calibration.tables.measurements import GPUS, systems_folder


def to_json(fitted: FittedTables) -> str:
    """The tables as one JSON object, by their names in a profile."""
    data = {name: table.model_dump(mode="json") for name, table in fitted.tables.items()}
    return json.dumps(data, separators=(",", ":")) + "\n"


def markdown_row(gpu: str, report: FitReport) -> str:
    """One row of the table of errors."""
    known = report.baseline_median is not None
    baseline = f"{report.baseline_median:.1%} / {report.baseline_p90:.1%}" if known else "-"
    return (
        f"| {gpu} | {report.kernel} | {report.num_samples} | {report.num_held_out}"
        f" | {report.median:.1%} / {report.p90:.1%} | {baseline} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, write `<out>/<gpu>.json`, and print the errors as a markdown table."""
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
    print("| GPU | Table | Fitted points | Held-out points | Error, median / p90 | Unsmoothed, median / p90 | File |")
    print("|---|---|---|---|---|---|---|")
    for gpu in options.gpu or GPUS:
        fitted = fit_tables(gpu, options.data, options.seed)
        text = to_json(fitted)
        (options.out / f"{gpu}.json").write_text(text, encoding="utf-8")
        for report in fitted.report:
            print(f"{markdown_row(gpu, report)} {len(text) / 1e3:.0f} kB |")


if __name__ == "__main__":
    main()
