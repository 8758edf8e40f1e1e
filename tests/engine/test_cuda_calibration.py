"""Calibration and validation through the CUDA machine, on a device that is a thread: structure, not times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deferred import DeferredMachine
from fake_device import FakeDevice

from clo.engine.decoder import Decoder
from clo.engine.operations import Operations
from clo.specs import ModelSpec
from clo_calibration.calibrate import calibrate
from clo_calibration.probes import Grid
from clo_calibration.validate import validate

SHAPE = ModelSpec(
    name="tiny",
    source="made up",
    num_layers=3,
    hidden_size=48,
    intermediate_size=64,
    num_query_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=61,
    max_positions=512,
)
DESIGNS = ("resident", "streamed", "staged", "lru-cpu", "recall", "resolve", "clo")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    made = FakeDevice()

    def new_machine(self: Decoder, operations: Operations) -> DeferredMachine:
        return DeferredMachine(operations, made, patience_s=20.0, one_at_a_time=self._one_at_a_time)

    monkeypatch.setattr(Decoder, "_new_machine", new_machine)
    grid = Grid(fitted=((160, 1, 0.2),), held_out=((200, 2, 0.25),), baseline=(200, 1, 0.2))
    monkeypatch.setattr("clo_calibration.probes.CPU_GRID", grid)
    yield made
    made.close()


def test_every_operation_is_fitted_and_both_worlds_name_the_same(tmp_path: Path, device: FakeDevice) -> None:
    found = calibrate(SHAPE, samples=tmp_path / "samples", name="t", designs=DESIGNS, steps=2, rounds=1)
    assert device.replays
    runtime = {"graph_launch", "kernel_launch", "submit", "stream_sync", "read_back", "thread_wake"}
    assert runtime <= set(found.operations)
    assert {"gather_pages", "copy_staged", "copy_pages", "host_gather", "lru_update"} <= set(found.operations)
    judged = validate(found, samples=tmp_path / "other", designs=DESIGNS, steps=2, rounds=1)
    assert len(judged.points) > 2 * len(DESIGNS)
    assert all(point.differences == () for point in judged.points)
