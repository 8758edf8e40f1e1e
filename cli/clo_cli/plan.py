"""`clo plan`: fleets, designs, cost and head-room for a load under an SLO, and when offloading helps.

Knows nothing about how a service is simulated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from clo.errors import CloError, SpecError
from clo.files import write_json
from clo_cli.fleet_prices import Priced, best_of, prices_from, rank, with_price
from clo_cli.options import claim_folder, design_from, names_from, overrides_from
from clo_cli.serve_options import ROOTS, serve_options, service_from, serving_scene, trace_from

if TYPE_CHECKING:
    from clo.specs import Design
    from clo_cli.plan_jobs import FleetJob, Question
    from clo_sim.serving.crossover import CrossoverMap
    from clo_sim.serving.fleet_search import Attempt
    from clo_sim.serving.plan import Fleet

Job = TypeVar("Job")
Done = TypeVar("Done")

MACHINES = "h200,h100,a100,l40s"
DESIGNS = "resident,resident-sparse,streamed,lru-cpu,resolve,clo"
RESIDENT = ("resident", "resident-sparse")
CURVE = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25)
"""Latency is drawn at these multiples of the load that the fleet bears."""
DRAWS_AT_ONCE = 10
"""Of the costs, in one job: each job prices its steps anew."""


@click.command()
@serve_options
@click.option(
    "--slo",
    "slo_text",
    required=True,
    help='Limits (_pNN, _mean or _max of ttft, tpot, itl, e2e): "ttft_p95<2s, tpot_p95<50ms".',
)
@click.option(
    "--machines", default=MACHINES, show_default=True, help="GPUs to try: comma-separated presets or TOML files."
)
@click.option(
    "--designs", default=DESIGNS, show_default=True, help="Designs to try: comma-separated presets or TOML files."
)
@click.option(
    "--price", multiple=True, metavar="MACHINE=DOLLARS", help="Dollars a GPU and hour: h200=3.5. Repeat for more."
)
@click.option("--max-gpus", type=click.IntRange(1), default=256, show_default=True, help="Largest fleet to try.")
@click.option("--disaggregated", is_flag=True, help="Prefill on GPUs of its own: as many as the limits on TTFT need.")
@click.option(
    "--intervals", is_flag=True, help="How many GPUs the best design of each machine needs with a probability of 90%."
)
@click.option(
    "--map/--no-map",
    "with_map",
    default=True,
    show_default=True,
    help="Also map over which contexts and loads offloading helps.",
)
@click.option("--map-machine", help="Machine type of the map.  [default: the best fleet's]")
@click.option(
    "--map-output-tokens", type=click.IntRange(1), help="Tokens of an answer in the map.  [default: the trace's mean]"
)
@click.option(
    "--map-reuse", type=click.FloatRange(0, 1), help="Share of a prompt found cached in the map.  [default: as served]"
)
@click.option("--workers", type=click.IntRange(1), help="Processes to search in.  [default: one per core]")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for plan.json and figures.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(
    slo_text: str,
    machines: str,
    designs: str,
    price: tuple[str, ...],
    max_gpus: int,
    disaggregated: bool,
    intervals: bool,
    with_map: bool,
    map_machine: str | None,
    map_output_tokens: int | None,
    map_reuse: float | None,
    workers: int | None,
    out: Path | None,
    as_json: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Find the smallest fleet and the best design on each machine type for a load under an SLO.

    Prints GPUs, cost (with your prices), head-room until the SLO breaks and by which term, and over which contexts and
    loads offloading beats keeping everything on the GPU.

    \b
    clo plan --requests trace.jsonl --slo "ttft_p95<6s, tpot_p95<50ms"
    clo plan --load poisson:2 --input-tokens 32768 --output-tokens 512 \\
        --slo "e2e_p99<30s" --machines h200,l40s --price h200=3.5 --price l40s=1
    """
    from clo_cli.plan_jobs import Question
    from clo_sim.serving import parse_slo

    overrides, slo = overrides_from(settings, ROOTS), parse_slo(slo_text)
    machine_names = names_from("--machines", machines)
    prices = prices_from(price, machine_names)
    scenes = {name: serving_scene(options, overrides, name) for name in machine_names}
    model = scenes[machine_names[0]].model
    chosen = {name: design_from(name, overrides, model) for name in names_from("--designs", designs)}
    _check_names("--machines", {name: scene.machine.name for name, scene in scenes.items()})
    _check_names("--designs", {name: design.name for name, design in chosen.items()})
    if map_machine:
        serving_scene(options, overrides, map_machine)
    service = service_from(options, gpus=1, disaggregated=disaggregated)
    if out is not None:
        claim_folder(out)
    question = Question(
        options=options,
        overrides=overrides,
        trace=trace_from(options),
        slo=slo,
        service=service,
        max_gpus=max_gpus,
        disaggregated=disaggregated,
    )
    count = workers or os.cpu_count() or 1
    fleets = _fleets(question, machine_names, list(chosen.values()), count, intervals=intervals)
    priced = [with_price(one, prices, machine) for machine, one in fleets]
    best = best_of(priced)
    found = FleetPlan(question=question, priced=priced, best=best)
    if best is not None and best.fleet.head_room is not None and out is not None:
        found = replace(found, curve=_curve(question, machine_names, best, chosen, count))
    if with_map:
        where = map_machine or (best.fleet.machine if best else machine_names[0])
        drawn = _map_if_any(question, where, list(chosen.values()), best, map_output_tokens, map_reuse, count)
        found = replace(found, map=drawn)
    _report(found, out, prices_given=bool(prices), as_json=as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Everything that was found: fleets with their prices, and the best's latencies by load and the map, if wanted."""

    question: Question
    priced: Sequence[Priced]
    best: Priced | None
    curve: Sequence[tuple[float, Attempt]] = ()
    map: CrossoverMap | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        trace = self.question.trace
        return {
            "slo": str(self.question.slo),
            "trace": trace.name,
            "requests": len(trace),
            "rate_per_s": trace.rate_per_s if trace.duration_s else None,
            "fleets": [one.as_dict() for one in self.priced],
            "latency_against_load": [_point(*point) for point in self.curve] or None,
            "map": None if self.map is None else self.map.as_dict(),
        }


def _point(multiplier: float, tried: Attempt) -> dict[str, Any]:
    assert tried.result is not None  # it was served to the end
    return {
        "multiplier": multiplier,
        "values": dict(tried.values),
        "met": tried.met,
        "unstable": tried.result.unstable,
    }


def _check_names(option: str, names: dict[str, str]) -> None:
    """Tables and figures tell machines and designs apart by the names in their files."""
    first: dict[str, str] = {}
    for given, name in names.items():
        if name in first:
            raise SpecError(f"{option}: {first[name]} and {given} are both named {name!r}: rename one of them")
        first[name] = given


def _fleets(
    question: Question, machines: Sequence[str], designs: Sequence[Design], workers: int, *, intervals: bool
) -> list[tuple[str, Priced]]:
    """The smallest fleet of every machine and design, best design of each machine first and with its head-room."""
    from clo_cli.plan_jobs import FleetJob, run_fleet

    first = [FleetJob(question=question, machine=one, design=designs[0]) for one in machines]
    known = _run(run_fleet, first, workers, f"fleets with {designs[0].name}")
    near = {job.machine: fleet.gpus for job, fleet in zip(first, known, strict=True)}
    others = [
        FleetJob(question=question, machine=one, design=design, near=near[one])
        for one in machines
        for design in designs[1:]
    ]
    jobs, fleets = [*first, *others], [*known, *(_run(run_fleet, others, workers, "fleets") if others else [])]
    by_machine = {
        one: sorted(
            (pair for pair in zip(jobs, fleets, strict=True) if pair[0].machine == one), key=lambda pair: rank(pair[1])
        )
        for one in machines
    }
    leaders = [pairs[0] for pairs in by_machine.values() if pairs[0][1].gpus is not None]
    again = [FleetJob(question=question, machine=job.machine, design=job.design, fleet=fleet) for job, fleet in leaders]
    with_room = _run(run_fleet, again, workers, "head-room") if again else []
    if intervals and again:
        again = [replace(job, fleet=fleet) for job, fleet in zip(again, with_room, strict=True)]
        with_room = _with_intervals(again, workers)
    rooms = {job.machine: fleet for job, fleet in zip(again, with_room, strict=True)}
    listed = []
    for machine, pairs in by_machine.items():
        for place, (_, fleet) in enumerate(pairs):
            leads = place == 0 and machine in rooms
            listed.append((machine, Priced(fleet=rooms[machine] if leads else fleet, best=leads)))
    return listed


def _with_intervals(jobs: Sequence[FleetJob], workers: int) -> list[Fleet]:
    """Draws in parts: every worker has some, and the bar moves."""
    from clo_cli.plan_jobs import run_draws
    from clo_sim.intervals import DRAWS
    from clo_sim.serving.intervals import fleet_with_intervals

    starts = range(0, DRAWS, DRAWS_AT_ONCE)
    parts = [replace(job, draws=range(start, min(DRAWS, start + DRAWS_AT_ONCE))) for job in jobs for start in starts]
    drawn = _run(run_draws, parts, workers, "prediction intervals")
    return [
        fleet_with_intervals(job.fleet, drawn[at : at + len(starts)])
        for job, at in zip(jobs, range(0, len(drawn), len(starts)), strict=True)
        if job.fleet is not None
    ]


def _run(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int, what: str) -> list[Done]:
    from clo_cli.bars import progress_bar
    from clo_cli.plan_jobs import run_all

    with progress_bar() as bar:
        task = bar.add_task(what, total=len(jobs))
        return run_all(work, jobs, workers, lambda: bar.advance(task))


def _curve(
    question: Question, machines: Sequence[str], best: Priced, designs: dict[str, Design], workers: int
) -> list[tuple[float, Attempt]]:
    from clo_cli.plan_jobs import CurveJob, run_curve

    fleet = best.fleet
    machine = next(
        one
        for one in machines
        if serving_scene(question.options, question.overrides, one).machine.name == fleet.machine
    )
    design = next(one for one in designs.values() if one.name == fleet.design)
    jobs = [
        CurveJob(
            question=question,
            machine=machine,
            design=design,
            gpus=fleet.gpus or 1,
            prefill_gpus=fleet.prefill_gpus,
            multipliers=(share * (fleet.head_room or 1.0),),
        )
        for share in CURVE
    ]
    return [point for points in _run(run_curve, jobs, workers, "latency against load") for point in points]


def _map_if_any(
    question: Question, machine: str, designs: Sequence[Design], best: Priced | None, *ask: Any
) -> CrossoverMap | None:
    """The map, or none where there is nothing to map on this machine: fleets that were found are not lost for it."""
    try:
        return _map(question, machine, designs, best, *ask)
    except CloError as error:
        click.echo(f"clo: no map: {error}", err=True)
        return None


def _map(
    question: Question,
    machine: str,
    designs: Sequence[Design],
    best: Priced | None,
    output_tokens: int | None,
    reuse: float | None,
    workers: int,
) -> CrossoverMap | None:
    """One job per offloading design; their maps share the resident ones."""
    from clo import presets
    from clo_cli.plan_jobs import MapJob, run_map
    from clo_sim.serving.crossover import contexts_up_to

    offloading = [design for design in designs if design.offloads]
    if not offloading:
        return None
    served = best.fleet.result if best is not None else None
    answer = output_tokens or max(1, round(question.trace.mean_output_tokens))
    model = serving_scene(question.options, question.overrides, machine).model
    # the last of them is exact where a model chooses by itself what it attends to, and the only one that it can run
    residents = RESIDENT if model.indexer is None else RESIDENT[-1:]
    jobs = [
        MapJob(
            question=question,
            machine=machine,
            residents=tuple(presets.load_design(name, model) for name in residents),
            designs=(design,),
            contexts=contexts_up_to(min(262144, model.max_positions - answer)),
            output_tokens=answer,
            reused_share=reuse if reuse is not None else (served.prefix_hit_rate if served else 0.0),
        )
        for design in offloading
    ]
    maps = _run(run_map, jobs, workers, "map")
    e2e_s = {name: rows for one in maps for name, rows in one.e2e_s.items()}
    return replace(maps[0], e2e_s=e2e_s)


def _report(found: FleetPlan, out: Path | None, *, prices_given: bool, as_json: bool) -> None:
    from clo_cli.serve_tables import counted, print_fleets, print_map, rate

    data = found.as_dict()
    if out is not None:
        _save(data, found.best, out)
    if as_json:
        click.echo(json.dumps(data, indent=1))
        return
    question, trace = found.question, found.question.trace
    title = f"{counted(len(trace))} of {trace.name}, {rate(trace.rate_per_s)}, {question.options['model']}"
    print_fleets(found.priced, str(question.slo), title, prices_given=prices_given)
    if found.map is not None:
        print_map(found.map)
    if out is not None:
        click.echo(f"plan and figures: {out}")


def _save(data: dict[str, Any], best: Priced | None, out: Path) -> None:
    from clo_plots import plot_crossover, plot_fleets, plot_load, save_figure

    write_json(out / "plan.json", data)
    if data["map"] is not None:
        save_figure(plot_crossover(data["map"]), out / "crossover.png")
    if best is not None and data["latency_against_load"]:
        name = f"{best.fleet.design} on {best.fleet.gpus} x {best.fleet.machine}"
        save_figure(
            plot_load(data["latency_against_load"], data["slo"], data["rate_per_s"], title=name), out / "load.png"
        )
    if best is not None:
        save_figure(plot_fleets(data["fleets"]), out / "fleets.png")
