"""The parts of a plan that run in processes of their own, one for each machine and design. Knows no tables or files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from clo_cli.serve_options import serving_scene

if TYPE_CHECKING:
    from clo.specs import Design
    from clo.specs.overrides import Overrides
    from clo_sim.serving import RequestTrace, ServiceSettings, Slo
    from clo_sim.serving.crossover import CrossoverMap
    from clo_sim.serving.fleet_search import Attempt
    from clo_sim.serving.intervals import DrawnFleet
    from clo_sim.serving.plan import Fleet

Job = TypeVar("Job")
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every job of a plan shares; scenes are made where the job runs."""

    options: dict[str, Any]
    overrides: Overrides
    trace: RequestTrace
    slo: Slo
    service: ServiceSettings
    max_gpus: int
    disaggregated: bool = False

    @property
    def prices(self) -> dict[str, Any]:
        """How steps are priced, as keyword arguments."""
        return {"chunk_tokens": self.options["chunk_tokens"], "executor": self.options["executor"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetJob:
    """One design on one machine type; with a `fleet`, the load that it bears. `near` is a guess at the GPUs, `draws`
    are numbers of draws of the costs."""

    question: Question
    machine: str
    design: Design
    fleet: Fleet | None = None
    near: int | None = None
    draws: Sequence[int] = ()


def run_fleet(job: FleetJob) -> Fleet:
    """The smallest fleet, or the head-room of the one given."""
    from clo_sim.serving.plan import smallest_fleet, with_head_room

    ask = job.question
    scene = serving_scene(ask.options, ask.overrides, job.machine)
    given = (scene, job.design, ask.trace, ask.slo, ask.service)
    if job.fleet is not None:
        return with_head_room(job.fleet, *given, **ask.prices)
    return smallest_fleet(*given, max_gpus=ask.max_gpus, near=job.near, disaggregated=ask.disaggregated, **ask.prices)


def run_draws(job: FleetJob) -> DrawnFleet:
    """The job's fleet under its draws."""
    from clo_sim.serving.intervals import drawn_fleet

    ask = job.question
    assert job.fleet is not None
    scene = serving_scene(ask.options, ask.overrides, job.machine)
    given = (job.fleet, scene, job.design, ask.trace, ask.slo, ask.service)
    return drawn_fleet(*given, draws=job.draws, max_gpus=ask.max_gpus, seed=ask.options["seed"], **ask.prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveJob:
    """A fleet's latencies against multiples of the load."""

    question: Question
    machine: str
    design: Design
    gpus: int
    prefill_gpus: int
    multipliers: tuple[float, ...]


def run_curve(job: CurveJob) -> list[tuple[float, Attempt]]:
    """Served to the end at every multiple."""
    from dataclasses import replace

    from clo_sim.serving.plan import latency_curve

    ask = job.question
    scene = serving_scene(ask.options, ask.overrides, job.machine)
    service = replace(ask.service, gpus=job.gpus, prefill_gpus=job.prefill_gpus)
    return latency_curve(scene, job.design, ask.trace, ask.slo, service, job.multipliers, **ask.prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapJob:
    """One offloading design against the resident ones over context and load; rates are the same for all designs."""

    question: Question
    machine: str
    residents: tuple[Design, ...]
    designs: tuple[Design, ...]
    contexts: tuple[int, ...]
    output_tokens: int
    reused_share: float


def run_map(job: MapJob) -> CrossoverMap:
    """The map."""
    from clo_sim.serving.crossover import crossover_map

    ask = job.question
    return crossover_map(
        serving_scene(ask.options, ask.overrides, job.machine),
        job.designs,
        residents=job.residents,
        contexts=job.contexts,
        output_tokens=job.output_tokens,
        reused_share=job.reused_share,
        settings=ask.service,
        seed=ask.options["seed"],
        **ask.prices,
    )


def run_all(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int, ended: Callable[[], object]) -> list[Done]:
    """Results in the order of their jobs; `ended` is called as each ends. A single worker is this process."""
    if workers == 1 or len(jobs) == 1:
        return [_told(work(job), ended) for job in jobs]
    # a fresh interpreter: forking one that draws a progress bar from a thread may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                _told(future.result(), ended)
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _told(result: Done, ended: Callable[[], object]) -> Done:
    ended()
    return result
