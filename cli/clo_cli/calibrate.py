"""`clo calibrate`: measures this machine and writes its profile. Knows nothing about how costs are fitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from clo.files import write_text
from clo_cli.options import check_outputs, kept

if TYPE_CHECKING:
    from clo.operation_costs import OperationProfile


@click.command()
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device to measure."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="profile.json", show_default=True, help="File for the profile."
)
@click.option(
    "--model", help="Shape of the model: preset, TOML file or config.json.  [default: smollm2-135m; on CUDA llama-3-8b]"
)
@click.option("--layers", type=int, default=8, show_default=True, help="Layers of it to run.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Any field of the model's shape.")
@click.option("--designs", help="Presets to learn from, comma-separated.  [default: all]")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions, of which the fastest counts."
)
@click.option(
    "--samples", type=click.Path(path_type=Path), help="Where raw samples are kept.  [default: a folder beside --out]"
)
@click.option("--again", is_flag=True, help="Measure anew what is in --samples.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw every fit over its points, with its residuals.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def calibrate(
    device: str,
    out: Path,
    model: str | None,
    layers: int,
    settings: tuple[str, ...],
    designs: str | None,
    rounds: int,
    samples: Path | None,
    again: bool,
    figure: Path | None,
    as_json: bool,
) -> None:
    """Time every operation of the real decoder on this machine and fit what each costs.

    Operations are timed alone and beside others, with random weights; under 3 minutes on two cores. What is measured
    is kept: an interrupted calibration goes on where it stopped. --device cuda has not yet run on a GPU.

    \b
    clo calibrate --out my-laptop.json --figure fits.png
    clo validate --profile my-laptop.json
    """
    check_outputs(out, figure=figure)
    samples = samples or out.with_suffix(".samples")
    with kept(samples):
        profile = _calibrated(device, out, model, layers, settings, designs, rounds, samples, again)
    write_text(out, profile.model_dump_json(indent=1))
    if figure is not None:
        from clo_plots import plot_fits, save_figure

        save_figure(plot_fits(profile), figure)
    if as_json:
        click.echo(profile.model_dump_json(indent=1))
        return
    from clo_cli.calibration_tables import print_calibration

    print_calibration(profile)
    click.echo(f"profile: {out}")


def _calibrated(
    device: str,
    out: Path,
    model: str | None,
    layers: int,
    settings: tuple[str, ...],
    designs: str | None,
    rounds: int,
    samples: Path,
    again: bool,
) -> OperationProfile:
    from clo import presets
    from clo.specs.overrides import apply, parse_overrides
    from clo_cli.bars import phases
    from clo_cli.models import cut_to, need_engine

    changes = parse_overrides(settings, ("model",))
    model = model or ("llama-3-8b" if device == "cuda" else "smollm2-135m")
    shape = apply(cut_to(presets.load_model(model), layers), changes["model"], "model")
    need_engine("calibrating", "calibrate", ("scipy",))
    from clo_calibration.calibrate import calibrate as run
    from clo_calibration.machines import device_of, half_the_cores
    from clo_calibration.probes import named

    found = device_of(device)
    with half_the_cores(), phases() as progress:
        return run(
            shape,
            samples=samples,
            name=out.stem,
            device=found,
            designs=named(designs, found, shape),
            rounds=rounds,
            again=again,
            progress=progress,
        )
