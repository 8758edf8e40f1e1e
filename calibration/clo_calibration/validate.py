"""Runs designs for real and simulates each on its own hits and misses. Knows nothing about fitting or commands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

from clo.engine.measure import MachineRun
from clo.errors import CloError
from clo.operation_costs import OperationProfile
from clo.progress import PhaseProgress, nobody
from clo.timeline import save_chrome_trace
from clo_calibration.calibrate import claim_samples, measure, network_of, rounds_of
from clo_calibration.comparison import ABLATIONS, Comparison, compare, price_run, simulated_s
from clo_calibration.fingerprint import differences, fingerprint
from clo_calibration.probes import STEPS, Probe, designs_of, grid_of, validation_probes
from clo_calibration.verdict import Pair, Point, Verdict
from clo_sim.intervals import predict


def validate(
    profile: OperationProfile,
    *,
    samples: Path,
    designs: Sequence[str] | None = None,
    sizes: int | None = None,
    steps: int = STEPS,
    rounds: int = 3,
    again: bool = False,
    any_machine: bool = False,
    timeline: Path | None = None,
    progress: PhaseProgress = nobody,
) -> Verdict:
    """Real and simulated decode steps of a grid of designs (presets, by default all that run there) and sizes; `sizes`
    limits it to the first so many of each.

    Writes one step in both worlds to `timeline`. Raises `CloError` for a profile of another machine, unless
    `any_machine`.
    """
    device = torch.device(profile.fingerprint.get("device", "cpu"))
    here = fingerprint(device)
    if not any_machine and (found := differences(here, profile.fingerprint)):
        raise CloError(f"profile {profile.name} is of another machine ({'; '.join(found)}): --any-machine to go on")
    network = network_of(profile.model, device)
    claim_samples(samples, here, network.spec, again=again)
    designs = designs or designs_of(device, profile.model)
    grid = grid_of(device, profile.model)
    probes = _first_sizes(validation_probes(profile.model, designs, steps=steps, grid=grid), sizes)
    runs = measure(network, probes, samples, progress, rounds=rounds)
    points = []
    for done, (probe, run) in enumerate(zip(probes, runs, strict=True)):
        progress("simulation", done, len(probes))
        disturbed = [float(np.median(other.step_s)) for other in rounds_of(network, probe, samples, rounds)]
        points.append(point_of(profile, probe, run, float(np.median(disturbed))))
    progress("simulation", len(probes), len(probes))
    if timeline is not None:
        shown = compare(profile, runs[-1])
        save_chrome_trace(timeline, [shown.real, shown.simulated])
    return Verdict(
        profile=profile.name,
        machine=profile.machine.name,
        model=f"{profile.model.name} ({profile.model.num_layers} layers)",
        date=date.today().isoformat(),
        fingerprint=here,
        drift=profile.drift,
        rounds=rounds,
        calibrated_rounds=profile.rounds,
        points=tuple(points),
    )


def _first_sizes(probes: Sequence[Probe], count: int | None) -> list[Probe]:
    """Of fitted and held-out sizes the first so many."""
    if count is None:
        return list(probes)
    chosen = []
    for fitted in (True, False):
        sizes = list(dict.fromkeys(probe.size for probe in probes if probe.fitted is fitted))[:count]
        chosen += [probe for probe in probes if probe.size in sizes]
    return chosen


def point_of(profile: OperationProfile, probe: Probe, run: MachineRun, disturbed_s: float) -> Point:
    """One run in both worlds."""
    interval = predict(price_run(profile, run)).intervals["tpot_p50_s"]
    without = {part: simulated_s(profile, run, part) for part in ABLATIONS}
    comparison = compare(profile, run)
    context, batch, budget = probe.size
    return Point(
        design=probe.design.name,
        context_tokens=context,
        batch=batch,
        budget_fraction=budget,
        fitted=probe.fitted,
        real_s=float(np.median(run.step_s)),
        calibrated_s=profile.steps_s.get(probe.place) if probe.fitted else None,
        disturbed_s=disturbed_s,
        simulated_s=without["nothing"],
        low_s=interval.low,
        high_s=interval.high,
        hit_rate=run.traffic.hit_rate,
        differences=tuple(comparison.differences()),
        without=dict(without),
        **_in_both(comparison),
    )


def _in_both(comparison: Comparison) -> dict[str, dict[str, Pair]]:
    found = {"operations": comparison.operations(), "lanes": comparison.lanes(), "stalls": comparison.stalls()}
    return {
        field: {name: Pair(real_s=real, simulated_s=simulated) for name, (real, simulated) in pairs.items()}
        for field, pairs in found.items()
    }
