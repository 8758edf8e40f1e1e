"""Runs of the small shape, and the profile that is fitted to them."""

from __future__ import annotations

import pytest
import torch

from clo.engine.measure import MachineRun
from clo.engine.models.network import Network
from clo.engine.random_weights import random_model
from clo.operation_costs import (
    OperationProfile,
)
from clo_calibration.fingerprint import fingerprint
from clo_calibration.handover_fit import handover_s, launch_hold_s
from clo_calibration.operation_fit import (
    by_key,
    fit_costs,
    observations,
)
from clo_calibration.probes import (
    local_design,
)
from tests.engine.calibration.calibrated import DESIGNS, SHAPE, SIZE, run_of


@pytest.fixture(scope="session")
def network() -> Network:
    return Network(random_model(SHAPE), SHAPE.name)


@pytest.fixture(scope="session")
def runs(network: Network) -> dict[str, tuple[MachineRun, MachineRun]]:
    """Alone and beside others, by design."""
    found = {}
    for name in DESIGNS:
        design = local_design(name, SIZE, SHAPE)
        if design.selects:
            design = design.with_fields(dense_layers=1)
        found[name] = (run_of(network, design, alone=True), run_of(network, design))
    return found


@pytest.fixture(scope="session")
def profile(runs: dict[str, tuple[MachineRun, MachineRun]]) -> OperationProfile:
    alone = by_key(row for number, (run, _) in enumerate(runs.values()) for row in observations(run, number))
    beside = by_key(row for number, (_, run) in enumerate(runs.values()) for row in observations(run, number))
    runtime = {key: timed for key, timed in beside.items() if timed.rows[0].is_runtime}
    together = [run for _, run in runs.values()]
    some, hold = together[0].plan, launch_hold_s(together)
    return OperationProfile(
        name="here",
        date="2026-01-01",
        machine=some.machine,
        model=some.model,
        fingerprint=fingerprint(torch.device("cpu")),
        operations=fit_costs({key: timed for key, timed in alone.items() if not timed.rows[0].is_runtime} | runtime),
        handover_s=handover_s(together, hold),
        launch_hold_s=hold,
    )
