"""Calibration of models that choose what they attend to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from latent import INDEXER, latent_model

from clo import presets
from clo.engine.measure import MachineRun
from clo.engine.models.network import Network
from clo.operation_costs import OperationProfile, feature_values
from clo.schedule import record_step
from clo.schedule.ops import price_name
from clo.schedule.work import IndexTokens
from clo.specs import ModelSpec
from clo_calibration.calibrate import calibrate
from clo_calibration.comparison import compare
from clo_calibration.probes import (
    CPU_GRID,
    CUDA_GRID,
    Grid,
    calibration_probes,
    designs_of,
    local_design,
    plain_design,
    quick_designs,
    validation_probes,
)
from clo_calibration.validate import validate
from tests.engine.calibration.calibrated import SIZE, run_of

CPU = torch.device("cpu")
KINDS = ("DeepseekV32", "GlmMoeDsa")
"""The second's every other layer has no indexer."""
CHOSEN = ("resident-sparse", "resolve", "clo")


@pytest.fixture(scope="module", params=KINDS)
def network(request: pytest.FixtureRequest) -> Network:
    return Network(latent_model(request.param, max_position_embeddings=4096), request.param)


@pytest.fixture(scope="module")
def profile(network: Network, tmp_path_factory: pytest.TempPathFactory) -> OperationProfile:
    samples = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clo_calibration.probes.CPU_GRID", small_grid())
        patch.setattr("clo_calibration.calibrate.network_of", lambda *_: network)
        return calibrate(network.spec, samples=samples, name="here", designs=CHOSEN, steps=3, rounds=1)


def small_grid() -> Grid:
    return Grid(fitted=((160, 1, 0.2), (224, 2, 0.1)), held_out=((200, 2, 0.25),), baseline=CPU_GRID.baseline)


def run(network: Network, name: str, **changes: object) -> MachineRun:
    return run_of(network, local_design(name, SIZE, network.spec).with_fields(**changes), steps=6)


def test_both_worlds_name_the_same_operations(network: Network, profile: OperationProfile) -> None:
    for name in CHOSEN:
        found = compare(profile, run(network, name))
        real, simulated = (
            [(s.lane, s.name, s.layer, s.num_bytes) for s in t.spans] for t in (found.real, found.simulated)
        )
        assert sorted(real) == sorted(simulated)
        asked = [span for span in found.simulated.spans if span.name == "index_tokens"]
        shared = network.spec.indexer.shared_layers if network.spec.indexer else ()
        assert [span.layer for span in asked] == [at for at in range(network.spec.num_layers) if at not in shared]


def test_what_the_indexer_takes_is_fitted(profile: OperationProfile) -> None:
    assert profile.operations["index_tokens"].per_unit
    assert profile.fits["index_tokens"]


def test_the_indexer_s_work_is_what_a_cpu_does(network: Network) -> None:
    """All keys of all sequences, unless no head of the layer asks."""
    done = run(network, "clo", tau=0.05)
    ops = [node.op for node in record_step(done.plan).nodes if isinstance(node.op.work, IndexTokens)]
    assert {price_name(op) for op in ops} == {"index_tokens"}
    found = feature_values(ops[0].work, done.plan, done.traffic)
    asked = np.asarray(done.traffic.demand_heads)
    assert 0 < asked.mean() < 2, "the gate keeps some and not all"
    keys = network.spec.indexer.key_bytes if network.spec.indexer else 0
    assert found["all_bytes"] == 2 * done.plan.workload.context_tokens * keys
    np.testing.assert_allclose(found["scanned_bytes"], np.where(asked > 0, found["all_bytes"], 0.0))
    np.testing.assert_allclose(found["bytes"], asked * float(np.asarray(found["all_bytes"])) / 2)


def test_a_verdict_of_such_a_model(
    network: Network, profile: OperationProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clo_calibration.probes.CPU_GRID", small_grid())
    monkeypatch.setattr("clo_calibration.validate.network_of", lambda *_: network)
    found = validate(profile, samples=tmp_path, designs=CHOSEN, steps=3, rounds=1)
    assert {point.design for point in found.points} >= set(CHOSEN)
    assert not [point for point in found.points if point.differences]


@pytest.mark.parametrize("grid", [CPU_GRID, CUDA_GRID])
@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5.2"])
def test_no_budget_is_more_than_the_indexer_chooses(name: str, grid: Grid) -> None:
    model = presets.load_model(name)
    assert model.indexer is not None
    designs = designs_of(CPU, model)
    probes = [*calibration_probes(model, designs, grid=grid), *validation_probes(model, designs, grid=grid)]
    for probe in probes:
        context, _, budget = probe.size
        assert probe.design.budget_pages == min(round(budget * context), model.indexer.top_tokens)
        assert probe.design.asks_indexer
    assert any(probe.design.budget_pages == model.indexer.top_tokens for probe in probes) is (grid is CUDA_GRID)


def test_designs_that_suit_a_model() -> None:
    plain, own, shared = (presets.load_model(name) for name in ("llama-3-8b", "deepseek-v3.2", "glm-5.2"))
    everything = designs_of(CPU, plain)
    assert set(everything) - set(designs_of(CPU, own)) == {"resident", "streamed"}
    assert {"clo-v2", "clo-v1", "staged"} <= set(designs_of(CPU, own)) - set(designs_of(CPU, shared))
    assert set(designs_of(CPU, shared)) >= {"resident-sparse", "resolve", "clo", "lru-cpu", "recall"}
    assert all(not probe.design.prefetches_layers for probe in validation_probes(shared, designs_of(CPU, shared)))
    assert [plain_design(model) for model in (plain, own)] == ["resident", "resident-sparse"]
    assert set(quick_designs(own)) <= set(designs_of(CPU, own))


def test_the_small_models_choose_less_than_their_context(network: Network) -> None:
    spec: ModelSpec = network.spec
    assert spec.indexer is not None
    assert spec.indexer.top_tokens == INDEXER["index_topk"] < SIZE[0]
