"""`clo simulate`: one design. Knows nothing about sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError
from clo_cli.options import check_outputs, design_from, overrides_from, scene_from, scene_options

if TYPE_CHECKING:
    from clo.results import Result
    from clo.specs import Design
    from clo_cli.bars import Tell
    from clo_sim.contention import Contention
    from clo_sim.priced import PricedStep
    from clo_sim.scene import Scene
    from clo_sim.step_times import StepTimes


@click.command()
@scene_options
@click.option("--design", "design_name", default="clo", show_default=True, help="Preset or TOML file.")
@click.option(
    "--executor",
    type=click.Choice(["simpy", "clock"]),
    default="simpy",
    show_default=True,
    help="simpy: operations slow each other; clock: they do not.",
)
@click.option("--timeline", type=click.Path(path_type=Path), help="Write one step as Chrome trace JSON (Perfetto).")
@click.option("--timeline-step", type=int, help="Measured step to write, counted from 0.  [default: 0]")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option("--intervals", is_flag=True, help="Add 90% prediction intervals from the spread of costs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def simulate(
    design_name: str,
    executor: str,
    timeline: Path | None,
    timeline_step: int | None,
    out: Path | None,
    intervals: bool,
    as_json: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Run one design in simulation and print where a decode step's time goes.

    \b
    clo simulate --design clo --context 131072 --batch 16
    clo simulate --design resolve --set design.slot_budgets=2 --timeline step.json
    """
    from clo_cli.bars import phases
    from clo_sim.run import simulate as run

    overrides = overrides_from(settings)
    scene = scene_from(options, overrides)
    design = design_from(design_name, overrides, scene.model)
    step = _step(timeline_step, timeline, scene.workload.steps)
    check_outputs(timeline, out)
    with phases() as tell:
        tell("simulating", 0, None)
        result = run(scene, design, executor="clock" if executor == "clock" else "simpy")
        tell("simulating", 1, 1)
        if intervals:
            result = _with_intervals(result, scene, design, executor, tell)
    if timeline is not None:
        _write_timeline(timeline, scene, design, executor, step)
    if out is not None:
        result.save(out)
    if as_json:
        click.echo(result.model_dump_json(indent=1))
    else:
        from clo_cli.tables import print_result

        print_result(result)
        if timeline is not None:
            click.echo(f"timeline of step {step}: {timeline} (open in https://ui.perfetto.dev)")


def _with_intervals(result: Result, scene: Scene, design: Design, executor: str, tell: Tell) -> Result:
    from clo_sim.clock import run_clock
    from clo_sim.intervals import with_intervals
    from clo_sim.simulator import run_simpy

    def run(priced: PricedStep, contention: Contention | None = None) -> StepTimes:
        return run_clock(priced) if executor == "clock" else run_simpy(priced, contention=contention)

    def progress(done: int, total: int) -> None:
        tell("prediction intervals", done, total)

    return with_intervals(result, scene.priced(scene.plan(design)), run=run, progress=progress)


def _step(given: int | None, timeline: Path | None, steps: int) -> int:
    if given is not None and timeline is None:
        raise SpecError(f"--timeline-step = {given}: --timeline FILE is needed, where the step is to go")
    step = given or 0
    if not 0 <= step < steps:
        raise SpecError(f"--timeline-step = {step}: must be from 0 to {steps - 1} (workload.steps = {steps})")
    return step


def _write_timeline(path: Path, scene: Scene, design: Design, executor: str, step: int) -> None:
    from clo.timeline import save_chrome_trace
    from clo_sim.unfold import clock_timeline, simulated_timeline

    priced = scene.priced(scene.plan(design))
    unfold = clock_timeline if executor == "clock" else simulated_timeline
    save_chrome_trace(path, [unfold(priced, step, f"{design.name} ({executor}, step {step})")])
