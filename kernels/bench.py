"""The bench of the kernels: `python kernels/bench.py --out bench.json`. See `clo_kernels_bench`.

Every operation is compared with its reference first; then come times, each beside its limit. Without a CUDA device the
references run instead, which says nothing about a GPU. Exit code 1 if an operation was wrong or a section failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from clo_kernels_bench.figures import Report


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything, raw samples included, as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples")
    parser.add_argument("--seconds", type=float, default=420, help="begin nothing new after this time (default 420)")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g}: must be positive")
    if options.out is not None and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: no folder {options.out.parent}")

    from clo_kernels_bench import on_cpu, run  # torch takes seconds: after bad arguments were refused

    environment = run.environment()
    report = Report(environment, options.quick, "" if environment["device"] == "cuda" else on_cpu.NOTE)
    print(*(f"{key}: {value}" for key, value in environment.items()), report.note, sep="\n", flush=True)
    run.run(
        report,
        lambda text: print(text, flush=True),
        quick=options.quick,
        seconds=options.seconds,
        save=lambda: _write(options.out, report),
    )
    print(*("", "left out:", *report.left_out) if report.left_out else (), sep="\n")
    return 1 if report.failed_operations or report.failed else 0


def _write(path: Path | None, report: Report) -> None:
    """Whole or not at all."""
    if path is None:
        return
    half = path.with_name(path.name + ".part")
    half.write_text(json.dumps(report.as_json(), indent=1, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(half, path)


if __name__ == "__main__":
    sys.exit(main())
