"""`clo explore`: designs side by side, a sweep of choices, what each is worth, and the files behind it.

Knows nothing about how a step is run or drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import SpecError
from clo_cli.options import (
    check_outputs,
    claim_folder,
    design_from,
    names_from,
    overrides_from,
    scene_from,
    scene_options,
)
from clo_cli.real_machine import measure_here
from clo_cli.space import check_conflicts, space_from

if TYPE_CHECKING:
    from clo.specs import Design, ModelSpec
    from clo.specs.overrides import Overrides
    from clo_sim.explore import Exploration
    from clo_sim.goals import Goals
    from clo_sim.record import Record
    from clo_sim.scene import Scene
    from clo_sim.workers import Workers

WORKERS_PER_CORE = 16


@click.command()
@scene_options
@click.option("--designs", help="Designs to compare: comma-separated presets or TOML files.  [default: all presets]")
@click.option("--base", default="clo", show_default=True, help="The design whose choices are swept.")
@click.option(
    "--vary",
    multiple=True,
    metavar="FIELD=V1,V2",
    help="A field and the values to try: design.slot_budgets=1,2,none, workload.batch=4,16, machine=h200,l40s, "
    "machine.link.h2d_bytes_per_s=25e9,50e9. Repeat for a grid. With --evaluations also ranges: design.tau=0.5..0.95, "
    "workload.batch=1..64:log.  [default: cache, slot_budgets, prefetch_depth, transfer, sync]",
)
@click.option(
    "--evaluations",
    type=click.IntRange(1),
    metavar="N",
    help="Let an optimiser (Optuna) spend N evaluations instead of trying every combination.",
)
@click.option(
    "--objective",
    "objectives",
    multiple=True,
    metavar="METRIC",
    help="What to improve, e.g. kv_device_bytes, tokens_per_s. Repeat for a trade-off.  [default: tpot_s]",
)
@click.option(
    "--require",
    "bounds",
    multiple=True,
    metavar="METRIC>=VALUE",
    help="What the best must keep, e.g. 'overlap>=0.9' or 'kv_device_bytes<=60e9'. Repeat for more.",
)
@click.option("--no-sweep", is_flag=True, help="Compare the named designs only.")
@click.option(
    "--finalists", type=click.IntRange(1), default=5, show_default=True, help="Best of the swept designs to simulate."
)
@click.option("--intervals", is_flag=True, help="Also 90% prediction intervals of what is simulated.")
@click.option("--measure", is_flag=True, help="Run the finalists for real: --machine is what was calibrated here.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for results and figures.  [default: none are written]"
)
@click.option("--parquet", type=click.Path(path_type=Path), help="Write every evaluation as a row of this table.")
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Keep each evaluation in this file as it ends, and take what is there from it: resumes a run.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes to evaluate in.  [default: all cores, if it pays]")
@click.option("--cluster", metavar="ADDRESS", help="Evaluate on a Dask cluster, e.g. tcp://scheduler:8786.")
@click.option("--figures/--no-figures", default=True, show_default=True, help="Draw figures, too, into --out.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def explore(
    designs: str | None,
    base: str,
    vary: tuple[str, ...],
    evaluations: int | None,
    objectives: tuple[str, ...],
    bounds: tuple[str, ...],
    no_sweep: bool,
    finalists: int,
    intervals: bool,
    measure: bool,
    out: Path | None,
    parquet: Path | None,
    record: Path | None,
    workers: int | None,
    cluster: str | None,
    figures: bool,
    as_json: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Find the fastest design for a workload, and why.

    Named designs are simulated side by side with the same device memory for KV to use. Then choices of one design are
    swept: the clock sifts all combinations, the simulator decides among the best, and each choice of the winner is
    changed alone. On a machine that `clo calibrate` has timed, --measure lets real runs of the best decide: random
    weights, contexts and texts made up, so that other pages are chosen than in the trace.

    \b
    clo explore --out out
    clo explore --batch 1 --context 32768 --machine l40s
    clo explore --vary design.slot_budgets=1,2,none --vary design.tau=0.7,0.8
    clo explore --vary machine=h200,l40s --vary workload.batch=4,8,16 \\
        --objective tokens_per_s
    clo explore --vary design.tau=0.5..0.95 --evaluations 200 \\
        --require 'overlap>=0.85' --record search.jsonl

    Ctrl-C ends a run early: what was evaluated is printed and written all the same.
    """
    from clo_cli.bars import phases
    from clo_sim.explore import DEFAULT_GRID, with_intervals
    from clo_sim.explore import explore as run

    overrides = overrides_from(settings)
    scene = scene_from(options, overrides)
    around = design_from(base, overrides, scene.model)
    named = _named(designs, overrides, scene.model)
    if no_sweep and (vary or evaluations is not None):
        raise SpecError("--no-sweep: compares the named designs only, without --vary and --evaluations")
    space = {} if no_sweep else space_from(vary, scene, around) or DEFAULT_GRID
    check_conflicts(space, overrides, options["profile"])
    goals = _goals(objectives, bounds)
    real = measure_here(scene) if measure else None
    if out is not None:
        claim_folder(out)
    check_outputs(parquet)
    with ExitStack() as held:
        tell = held.enter_context(phases())
        found = run(
            scene,
            named=named,
            base=around,
            space=space,
            num_finalists=finalists,
            budget=evaluations,
            goals=goals,
            record=held.enter_context(_record(record)) if record is not None else None,
            workers=held.enter_context(_workers(scene, workers, cluster)),
            measure=real,
            seed=scene.workload.seed,
            progress=partial(tell, "trying designs"),
        )
        if intervals and not found.interrupted:
            found = with_intervals(found, scene, partial(tell, "prediction intervals"))
    _report(found, scene, around, searched=evaluations is not None, as_json=as_json)
    _write(found, scene, out, parquet, figures)
    if out is not None and not as_json:
        click.echo(f"results{' and figures' if figures and not found.interrupted else ''} are in {out}/")
    if found.interrupted:
        raise click.Abort


def _goals(objectives: tuple[str, ...], bounds: tuple[str, ...]) -> Goals:
    from clo_sim.goals import Bound, Goals, check_metric

    try:
        names = tuple(dict.fromkeys(check_metric(name) for name in objectives))
    except SpecError as error:
        raise SpecError(f"--objective: {error}") from None
    try:
        return Goals(objectives=names or ("tpot_s",), bounds=tuple(Bound.parse(text) for text in bounds))
    except SpecError as error:
        raise SpecError(f"--require: {error}") from None


def _record(path: Path) -> Record:
    from clo_sim.record import Record

    return Record(path)


def _workers(scene: Scene, count: int | None, cluster: str | None) -> Workers:
    from clo_sim.workers import DaskPool, LocalPool, Workers, num_cores

    if cluster is not None:
        if count is not None:
            raise SpecError("--workers and --cluster: a cluster has its own workers: give one of the two")
        return Workers(scene, DaskPool(scene, cluster))
    most = WORKERS_PER_CORE * num_cores()
    if count is not None and count > most:
        raise SpecError(f"--workers = {count}: must be at most {most}, {WORKERS_PER_CORE} for each core")
    count = count or num_cores()
    return Workers(scene, LocalPool(scene, count) if count > 1 else None)


def _named(designs: str | None, overrides: Overrides, model: ModelSpec) -> list[Design]:
    """The designs to compare, with `--set design.*` applied; presets that it contradicts are left out, and named."""
    from clo import presets

    if designs is not None:
        return [design_from(name, overrides, model) for name in names_from("--designs", designs)]
    found = []
    for name in presets.names("designs"):
        try:
            found.append(design_from(name, overrides, model))
        except SpecError as error:
            click.echo(f"clo: {name} is left out: {error}", err=True)
    return found


def _report(found: Exploration, scene: Scene, base: Design, *, searched: bool, as_json: bool) -> None:
    """Print what was found; of an interrupted run, what there is."""
    if found.interrupted and not found.front:
        click.echo(f"interrupted after {len(found.finished)} evaluations, before any design was simulated", err=True)
    elif as_json:
        click.echo(json.dumps(_as_json(found, scene, base), indent=1))
    else:
        _print(scene, found, base, searched)


def _print(scene: Scene, found: Exploration, base: Design, searched: bool) -> None:
    from clo_cli.tables import (
        console,
        print_choices,
        print_designs,
        print_intervals,
        print_measured,
        print_roofline,
        print_sources,
        print_trials,
    )

    machine, best = scene.machine, found.best_simulated
    question = f"{scene.model.name} on {machine.label}: {scene.workload.label}"
    varied = sorted({field for one in found.candidates for field, _ in one.task.changes})
    console().print(question + (f" (varied: {', '.join(varied)})" if varied else ""), style="bold")
    offloads = best.design.offloads
    print_roofline(
        best, f"an exact design with the memory of {found.winner.task.label}" if offloads else "this workload"
    )
    elsewhere = bool(found.winner.task.changes)
    shown = {one.design.name: one for one in found.named_results}
    if found.candidates and not elsewhere:
        shown[best.design.name] = best
    unchanged = " in the question as given, nothing varied" if elsewhere else ""
    title = f"Designs with the same device memory for KV to use{unchanged}, simulated"
    print_designs(list(shown.values()), found.reasons, title)
    print_intervals([*shown.values()])
    if found.measured:
        print_measured(found)
    if found.candidates:
        console().print(f"Best of {_swept(found)}: {found.winner.task.label}: {_choices_of(found)}")
        for note in _notes(found, scene, base):
            console().print(f"  {note}")
    if found.finalists and (searched or elsewhere or found.goals.bounds or len(found.goals.objectives) > 1):
        print_trials(found)
    if found.choices is not None:
        print_choices(found.choices)
    print_sources([*shown.values(), best])


def _swept(found: Exploration) -> str:
    tried, ran = len(found.candidates), sum(one.runs for one in found.candidates)
    if found.measured:
        here = sum(one.runs for one in found.measured)
        return f"{here} finalists run here, of {tried} swept (named designs were simulated only)"
    return f"{tried} swept ({ran} can run, the best simulated) and {len(found.named_results)} named"


def _notes(found: Exploration, scene: Scene, base: Design) -> Iterator[str]:
    """What else a reader should know about the sweep."""
    from clo_sim.worth import task_differs_by

    fields = task_differs_by(scene, base, found.winner.task)
    if fields:
        yield (
            f"its answers are not those of {base.name} ({', '.join(fields)}): time alone does not decide, "
            "clo evaluate compares answers"
        )
    if found.goals.bounds:
        kept = sum(found.goals.allows(one) for one in found.candidates)
        yield f"{kept} of the swept keep {' and '.join(str(bound) for bound in found.goals.bounds)} on the clock"
    if found.contradictions:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in found.contradictions.items())
        yield f"combinations left out, which contradict themselves: {reasons}"
    if found.recalled:
        yield f"{found.recalled} evaluations were taken from the record"
    if found.interrupted:
        yield "interrupted: not all was tried"


def _choices_of(found: Exploration) -> str:
    from clo_cli.tables import METRIC_NAMES, metric_text

    best, design = found.best, found.best.design
    said = [f"TPOT {best.tpot_s * 1e3:.2f} ms"]
    for name in (name for name in found.goals.objectives if name != "tpot_s"):
        said.append(f"{METRIC_NAMES.get(name, name)} {metric_text(name, found.winner.metrics[name])}")
    if not design.offloads:
        return f"everything on the GPU: {', '.join(said)}"
    size = f"{best.slot_pages} slots a head ({best.slot_pages / best.budget_pages:.1f} budgets)"
    return (
        f"cache {design.cache} of {size}, prefetch depth {design.prefetch_depth}, {design.transfer} transfer, "
        f"{design.sync} synchronisation: {', '.join(said)}"
    )


def _as_json(found: Exploration, scene: Scene, base: Design) -> dict[str, Any]:
    from clo_sim.worth import task_differs_by

    return {
        "best": found.best.model_dump(mode="json"),
        "best_changes": dict(found.winner.task.changes),
        # without a sweep there is no base
        "answers_differ_by": task_differs_by(scene, base, found.winner.task) if found.candidates else (),
        "front": [
            {"name": one.task.label, "executor": one.task.level, "metrics": _known(one.metrics)} for one in found.front
        ],
        "named": [result.model_dump(mode="json") for result in found.named_results],
        "not_run": found.not_run,
        "finalists": [result.model_dump(mode="json") for result in found.finalist_results],
        "measured": [one.result.model_dump(mode="json") for one in found.measured if one.result is not None],
        "num_candidates": len(found.candidates),
        "contradictions": dict(found.contradictions),
        "num_from_record": found.recalled,
        "interrupted": found.interrupted,
        "choices": found.choices.model_dump(mode="json") if found.choices else None,
    }


def _known(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """What a machine cannot say is `null`: JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _write(found: Exploration, scene: Scene, out: Path | None, parquet: Path | None, figures: bool) -> None:
    """The tables always; what needs a winner and time to draw, of a run that was not interrupted."""
    from clo_cli.outputs import write_results, write_sweep

    if parquet is not None:
        write_sweep(parquet, scene, found)
    if out is not None:
        write_sweep(out / "sweep.parquet", scene, found)
        if not found.interrupted:
            write_results(out, scene, found, figures)
