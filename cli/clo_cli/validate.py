"""`clo validate`: how far simulation is from this machine. Knows nothing about how either is run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click

from clo.files import write_text
from clo_cli.options import claim_folder, kept


@click.command()
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    required=True,
    help="Profile that `clo calibrate` wrote.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="verdict", show_default=True, help="Folder for results."
)
@click.option("--designs", help="Presets to run, comma-separated.  [default: all]")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions, of which the fastest counts."
)
@click.option("--quick", is_flag=True, help="Three designs at two sizes: under a minute.")
@click.option("--again", is_flag=True, help="Measure anew what an earlier run left in --out.")
@click.option("--any-machine", is_flag=True, help="Go on with a profile of another machine.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def validate(
    profile_path: Path,
    out: Path,
    designs: str | None,
    rounds: int,
    quick: bool,
    again: bool,
    any_machine: bool,
    as_json: bool,
) -> None:
    """Run designs for real, simulate each on its own hits and misses, and say how far apart they are.

    Half of the runs are at sizes, or with choices, from which nothing was fitted: the verdict is over these. Leaves
    verdict.json, verdict.md, figures, and one step in both worlds for https://ui.perfetto.dev in --out. What is
    measured is kept there, and not measured again unless you say so.
    """
    from clo.operation_costs import load_operation_profile
    from clo_cli.bars import phases
    from clo_cli.models import need_engine

    profile = load_operation_profile(profile_path)
    claim_folder(out)
    need_engine("validating", "calibrate", ("scipy",))
    from clo_calibration.machines import device_of, half_the_cores
    from clo_calibration.probes import named, quick_designs
    from clo_calibration.validate import validate as run
    from clo_calibration.verdict import markdown
    from clo_plots import Judged, plot_ablation, plot_verdict, save_figure

    device = device_of(profile.fingerprint.get("device", "cpu"))
    with kept(out / "samples"), half_the_cores(), phases() as progress:
        verdict = run(
            profile,
            samples=out / "samples",
            designs=quick_designs(profile.model)
            if quick and designs is None
            else named(designs, device, profile.model),
            sizes=1 if quick else None,
            rounds=min(rounds, 2) if quick else rounds,
            again=again,
            any_machine=any_machine,
            timeline=out / "step.json",
            progress=progress,
        )
    summary = verdict.summary()
    write_text(out / "verdict.json", verdict.model_dump_json(indent=1))
    write_text(out / "verdict.md", markdown(verdict))
    judged = [
        Judged(point.real_s, point.simulated_s, point.low_s, point.high_s, point.fitted) for point in verdict.points
    ]
    save_figure(plot_verdict(judged), out / "verdict.png")
    save_figure(plot_ablation(verdict.ablation()), out / "ablation.png")
    if as_json:
        known = {name: value if math.isfinite(value) else None for name, value in summary.items()}
        click.echo(json.dumps(known, indent=1))
        return
    from clo_cli.calibration_tables import print_verdict

    print_verdict(summary, verdict.ablation())
    click.echo(f"verdict: {out / 'verdict.md'}")
