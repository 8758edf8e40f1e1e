"""Measures a machine and fits its profile: microbenchmarks, operations alone, operations beside each other.

Raw samples are kept beside the profile; what was measured before an interruption is not measured again. Knows nothing
about commands or figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from clo import presets
from clo.engine.measure import MachineRun, fastest
from clo.engine.memory import local_machine
from clo.engine.models.network import Network
from clo.engine.random_weights import checked, dtype_on, random_model
from clo.errors import CloError, SpecError
from clo.files import read_json, write_json
from clo.operation_costs import BenchmarkRow, FitPoint, OperationCost, OperationProfile
from clo.progress import PhaseProgress, nobody
from clo.specs import MachineSpec, ModelSpec
from clo_calibration.comparison import price_run, simulated_s
from clo_calibration.fingerprint import fingerprint
from clo_calibration.handover_fit import handover_s, launch_hold_s
from clo_calibration.host_benchmarks import Benchmark, host_benchmarks
from clo_calibration.interference_fit import Interference, fit_interference
from clo_calibration.operation_fit import (
    Observation,
    Timed,
    by_key,
    fit_costs,
    observations,
    predicted_s,
)
from clo_calibration.probes import (
    STEPS,
    Probe,
    calibration_probes,
    designs_of,
    grid_of,
    plain_design,
    plan_of,
    run_probe,
)
from clo_calibration.run_files import load_benchmarks, load_run, save_benchmarks, save_run

MICROBENCHMARKS = "microbenchmarks.json"
"""Beside the samples of decode steps."""


def network_of(model: ModelSpec, device: torch.device) -> Network:
    """Random weights in what models run in there. Raises `SpecError` where the machine cannot hold them."""
    return Network(random_model(checked(model, device), dtype=dtype_on(device), device=device), model.name)


def calibrate(
    model: ModelSpec,
    *,
    samples: Path,
    name: str,
    device: torch.device | None = None,
    designs: Sequence[str] | None = None,
    steps: int = STEPS,
    rounds: int = 3,
    again: bool = False,
    progress: PhaseProgress = nobody,
) -> OperationProfile:
    """Measure, fit, and return the profile; raw samples go to the folder `samples` and are taken up from there, unless
    everything is to be measured `again`.

    `designs`: presets, by default all that run there. Raises `SpecError` for fewer layers than they keep dense, and
    `CloError` if `samples` holds measurements of another machine or model.
    """
    device = device or torch.device("cpu")
    designs = designs or designs_of(device, model)
    _check_model(model, designs)
    network = network_of(model, device)
    here = fingerprint(device)
    claim_samples(samples, here, network.spec, again=again)
    probes = calibration_probes(model, designs, steps=steps, grid=grid_of(device, model))
    progress("microbenchmarks", 0, 1)
    benchmarks = _microbenchmarks(device, samples / MICROBENCHMARKS)
    progress("microbenchmarks", 1, 1)
    runs = measure(network, probes, samples, progress, rounds=rounds)
    profile = fit_profile(list(zip(probes, runs, strict=True)), benchmarks, name=name, here=here, network=network)
    return profile.model_copy(update={"rounds": rounds})


def _check_model(model: ModelSpec, designs: Sequence[str]) -> None:
    """Every design has a layer to offload: else nothing would be learnt of what it does there."""
    chosen = [presets.load_design(name, model) for name in designs]
    dense = max((design.dense_layers for design in chosen if design.selects), default=0)
    if model.num_layers <= dense:
        raise SpecError(f"model.num_layers = {model.num_layers}: designs keep {dense} of them dense: take more")


def _microbenchmarks(device: torch.device, path: Path) -> list[Benchmark]:
    """Unless that was done before."""
    if not path.exists():
        save_benchmarks(path, _run_microbenchmarks(device))
    return load_benchmarks(path)


def _run_microbenchmarks(device: torch.device) -> list[Benchmark]:
    threads = tuple(sorted({1, torch.get_num_threads(), 2}))
    if device.type != "cuda":
        return host_benchmarks(threads)
    from clo_calibration.device_benchmarks import device_benchmarks

    return device_benchmarks(device, threads)


def claim_samples(folder: Path, here: dict[str, str], model: ModelSpec, *, again: bool = False) -> None:
    """Samples of one machine and model only; `again`: none that are there already."""
    claim, wanted = folder / "machine.json", {"fingerprint": here, "model": model.model_dump(mode="json")}
    if claim.exists() and read_json(claim) != wanted:
        raise CloError(f"{folder}: holds samples of another machine, model or version: choose another folder")
    if again and claim.exists():
        for old in (*folder.glob("*.npz"), folder / MICROBENCHMARKS):
            old.unlink(missing_ok=True)
    write_json(claim, wanted)


def measure(
    network: Network, probes: Sequence[Probe], folder: Path, progress: PhaseProgress, *, rounds: int
) -> list[MachineRun]:
    """Run every probe once a round, unless that was done before; of each step the fastest round counts.

    Rounds lie minutes apart, so that a passing disturbance meets only one of them.
    """
    total = rounds * len(probes)
    for done, (number, probe) in enumerate((number, probe) for number in range(rounds) for probe in probes):
        progress("decode steps", done, total)
        path = _file(folder, probe, number)
        if not path.exists():
            save_run(path, run_probe(network, probe))
    progress("decode steps", total, total)
    return [read_back(network, probe, folder, rounds) for probe in probes]


def read_back(network: Network, probe: Probe, folder: Path, rounds: int) -> MachineRun:
    """The fastest steps of a probe's rounds."""
    return fastest(rounds_of(network, probe, folder, rounds))


def rounds_of(network: Network, probe: Probe, folder: Path, rounds: int) -> list[MachineRun]:
    """A probe's rounds, each as it was."""
    plan = plan_of(network, probe)
    return [load_run(_file(folder, probe, number), plan) for number in range(rounds)]


def _file(folder: Path, probe: Probe, number: int) -> Path:
    return folder / f"{probe.key}-{number}.npz"


def fit_profile(
    measured: Sequence[tuple[Probe, MachineRun]],
    benchmarks: Sequence[Benchmark],
    *,
    name: str,
    here: dict[str, str],
    network: Network,
) -> OperationProfile:
    """Costs from runs; runs of which nothing may be learnt are left out."""
    learnt = [(number, probe, run) for number, (probe, run) in enumerate(measured) if probe.fitted]
    alone = by_key(row for number, probe, run in learnt if probe.alone for row in observations(run, number))
    beside = by_key(row for number, probe, run in learnt if not probe.alone for row in observations(run, number))
    runtime = {key: timed for key, timed in beside.items() if timed.rows[0].is_runtime}
    costs = fit_costs({key: timed for key, timed in alone.items() if not timed.rows[0].is_runtime} | runtime)
    together = [run for _, probe, run in learnt if not probe.alone]
    interference = fit_interference(beside, costs)
    hold, plain = launch_hold_s(together), plain_design(network.spec)
    profile = OperationProfile(
        name=name,
        date=date.today().isoformat(),
        note="fitted to decode steps of random weights; every cost was timed on this machine",
        machine=_machine(network.device, benchmarks, name),
        model=network.spec,
        fingerprint=here,
        operations={key: _beside_others(key, cost, interference) for key, cost in costs.items()},
        handover_s=handover_s(together, hold),
        launch_hold_s=hold,
        drift=drift([run for _, probe, run in learnt if probe.design.name == plain and not probe.alone]),
        steps_s={probe.place: float(np.median(run.step_s)) for _, probe, run in learnt if not probe.alone},
        benchmarks=tuple(_row(benchmark) for benchmark in benchmarks),
        fits={key: _points(timed, costs[key]) for key, timed in (alone | runtime).items() if key in costs},
    )
    return profile.model_copy(update={"common_spread": _common_spread(profile, together)})


def drift(baselines: Sequence[MachineRun]) -> float:
    """Relative standard deviation of the same run's median step, repeated through the calibration."""
    sizes = {(run.plan.workload.context_tokens, run.plan.workload.batch) for run in baselines}
    spreads = []
    for size in sizes:
        same = [run for run in baselines if (run.plan.workload.context_tokens, run.plan.workload.batch) == size]
        times = np.array([float(np.median(run.step_s)) for run in same])
        if len(times) > 2:
            spreads.append(float(times.std(ddof=1) / times.mean()))
    return max(spreads, default=0.0)


def _common_spread(profile: OperationProfile, runs: Sequence[MachineRun]) -> float:
    """Root mean square of relative errors of simulated steps that were fitted, less what operations explain."""
    errors = np.array([simulated_s(profile, run) / float(np.median(run.step_s)) - 1.0 for run in runs])
    explained = np.array([_explained(profile, run) for run in runs])
    return math.sqrt(max(0.0, float((errors**2).mean() - explained.mean())))


def _explained(profile: OperationProfile, run: MachineRun) -> float:
    """Relative variance of a step of which every operation's cost errs independently by its spread."""
    priced = price_run(profile, run)
    seconds: dict[str, float] = {}
    spreads: dict[str, float] = {}
    for task, places in priced.shape.places.items():
        entry, spreads_of = priced.pricer.uncertainty(task.work, task.name)
        spreads[entry] = spreads_of
        seconds[entry] = seconds.get(entry, 0.0) + float(np.mean(priced.prices[task])) * len(places.layers)
    total = sum(seconds.values())
    return float(sum((seconds[entry] / total * spreads[entry]) ** 2 for entry in seconds))


def _beside_others(key: str, cost: OperationCost, found: Interference) -> OperationCost:
    """The cost on a lane, with what other lanes do to it."""
    if key not in found.slowed:
        return cost
    per_unit = {feature: found.lane_factor[key] * seconds for feature, seconds in cost.per_unit.items()}
    return cost.model_copy(
        update={"per_unit": per_unit, "slowed": found.slowed[key], "host_share": found.host_share[key]}
    )


def _points(timed: Timed, cost: OperationCost) -> tuple[FitPoint, ...]:
    return tuple(_point(rows, cost) for rows in timed.per_run().values())


def _point(rows: Sequence[Observation], cost: OperationCost) -> FitPoint:
    fitted = float(np.mean([predicted_s(row, cost.per_unit) for row in rows]))
    return FitPoint(measured_s=float(np.mean([row.seconds for row in rows])), fitted_s=fitted)


def _row(benchmark: Benchmark) -> BenchmarkRow:
    rates = benchmark.amount / np.array(benchmark.seconds)
    return BenchmarkRow(
        name=benchmark.name,
        parameters=benchmark.parameters,
        unit=benchmark.unit,
        per_second=float(np.median(rates)),
        spread=float(np.std(rates) / np.mean(rates)),
        samples=len(rates),
    )


def _machine(device: torch.device, benchmarks: Sequence[Benchmark], name: str) -> MachineSpec:
    """This machine's memory with measured rates: on a CPU every link is a copy."""
    rates: dict[str, float] = {}
    for row in map(_row, benchmarks):
        rates[row.name] = max(row.per_second, rates.get(row.name, 0.0))
    found, on_cuda = local_machine(device), device.type == "cuda"
    to_device, to_host, memory = ("dma to device", "dma to host", "device memory") if on_cuda else ("copy",) * 3
    # a copy within a CPU's memory reads and writes it; a link reads or writes
    host = rates[to_device] if on_cuda else 2 * rates["copy"]
    device_memory = rates[memory] if on_cuda else host
    return found.with_fields(
        name=name,
        source="clo calibrate",
        profile=f"{name}.json",
        gpu=found.gpu.model_dump() | {"hbm_bytes_per_s": device_memory, "peak_flops_per_s": rates["matmul"]},
        link={"h2d_bytes_per_s": rates[to_device], "d2h_bytes_per_s": rates[to_host]},
        host=found.host.model_dump() | {"memory_bytes_per_s": host},
    )
