"""`clo serve-sim`: a trace of requests served in simulation. Knows nothing about fleets or prices."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clo.errors import CloError
from clo.files import write_json
from clo_cli.options import check_outputs, design_from, overrides_from
from clo_cli.serve_options import ROOTS, serve_options, service_from, serving_scene, trace_from

if TYPE_CHECKING:
    from clo_sim.serving import RequestTrace, ServiceResult, ServiceRun, ServiceSettings, Slo, WorkerCosts


@click.command(name="serve-sim")
@serve_options
@click.option("--design", "design_name", default="clo", show_default=True, help="Preset or TOML file.")
@click.option("--machine", default="h200", show_default=True, help="Preset or TOML file.")
@click.option("--profile", help="Preset or JSON file with the costs.  [default: the machine's]")
@click.option(
    "--gpus", type=int, help="GPUs of all replicas together.  [default: one replica's: 1, or machine.tensor_parallel]"
)
@click.option(
    "--prefill-gpus",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of these so many only prefill, and hand over to the others (disaggregated prefill).",
)
@click.option(
    "--slo",
    "slo_text",
    help='Limits (_pNN, _mean or _max of ttft, tpot, itl, e2e): "ttft_p95<2s, tpot_p95<50ms". Says which hold.',
)
@click.option("--no-coalesce", is_flag=True, help="Take every decode step by itself: slow, the same numbers.")
@click.option("--intervals", is_flag=True, help="Also 90% prediction intervals: served 40 times with drawn costs.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw queue and memory over time (.png, .svg, .pdf).")
@click.option("--out", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def serve_sim(
    design_name: str,
    machine: str,
    profile: str | None,
    gpus: int | None,
    prefill_gpus: int,
    slo_text: str | None,
    no_coalesce: bool,
    intervals: bool,
    figure: Path | None,
    out: Path | None,
    as_json: bool,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve requests on one or more GPUs in simulation, and say what users would see.

    Requests arrive, are routed to a GPU, admitted when GPU and host memory have room, prefilled in chunks, and decoded
    in batches that change with every step. A load that the service cannot keep up with is called unstable.

    \b
    clo serve-sim --requests trace.jsonl --design clo --machine h200 --gpus 4
    clo serve-sim --load poisson:2 --input-tokens 32768 --output-tokens 512 \\
        --slo "ttft_p95<5s"
    """
    from clo_sim.serving import parse_slo, summarise_service, worker_costs

    overrides = overrides_from(settings, ROOTS)
    slo = None if slo_text is None else parse_slo(slo_text)
    scene = serving_scene(options, overrides, machine, profile)
    design = design_from(design_name, overrides, scene.model)
    gpus = scene.machine.tensor_parallel if gpus is None else gpus
    service = service_from(
        options, gpus=gpus, disaggregated=prefill_gpus > 0, prefill_gpus=prefill_gpus, coalesce=not no_coalesce
    )
    check_outputs(out, figure=figure)
    trace = trace_from(options)
    costs = worker_costs(scene, design, trace, chunk_tokens=options["chunk_tokens"], executor=options["executor"])
    run, cpu_s = _timed(trace, costs, service)
    names = {"model": scene.model.name, "machine": scene.machine.name, "design": design.name}
    result = summarise_service(run, **names, slo=slo, cpu_s=cpu_s, with_measured_share=True)
    if intervals:
        result = _spread(result, run, slo, options["seed"])
    if out is not None:
        write_json(out, result.as_dict())
    if figure is not None:
        _draw(result, figure)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=1))
    else:
        from clo_cli.serve_tables import print_service

        print_service(result, owners=scene.machine.num_owners)


def _timed(trace: RequestTrace, costs: WorkerCosts, service: ServiceSettings) -> tuple[ServiceRun, float]:
    """The run, and its CPU seconds without those of pricing decode steps."""
    from clo_cli.bars import progress_bar
    from clo_sim.serving import serve

    with progress_bar() as bar:
        task = bar.add_task("requests", total=len(trace))
        start = time.process_time()
        run = serve(trace, costs, service, progress=lambda done, total: bar.update(task, completed=done))
        cpu_s = time.process_time() - start
    prices = costs.decode_prices
    return run, cpu_s - (prices.cpu_s if prices is not None else 0.0)


def _spread(result: ServiceResult, run: ServiceRun, slo: Slo | None, seed: int) -> ServiceResult:
    from clo_cli.bars import phases
    from clo_sim.serving.intervals import with_intervals

    with phases() as tell:
        return with_intervals(result, run, slo=slo, seed=seed, progress=partial(tell, "prediction intervals"))


def _draw(result: ServiceResult, path: Path) -> None:
    from clo_plots import plot_service, save_figure

    try:
        save_figure(plot_service(result.as_dict()), path)
    except CloError as error:
        # the numbers are not lost for it
        click.echo(f"clo: no figure: {error}", err=True)
