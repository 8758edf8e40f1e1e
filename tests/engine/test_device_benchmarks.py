"""The benchmarks of a CUDA device with a CPU in its place: they run, and count what they say. Times mean nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small import design, small_model

from clo import presets
from clo.engine.models.network import Network
from clo.engine.random_weights import random_prompt
from clo_calibration import device_benchmarks as benchmarks
from clo_calibration.calibrate import _machine

ROOT = Path(__file__).parents[2]


class Event:
    """Happens when it is recorded: what a stream was given is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, _stream: object = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e-6, (other.time - self.time) * 1e3)

    def query(self) -> bool:
        return True


class Stream:
    def wait_stream(self, _: object) -> None: ...
    def wait_event(self, _: object) -> None: ...
    def synchronize(self) -> None: ...


class Graph:
    """Calls nothing again: what is recorded has run."""

    calls: list[Callable[[], object]]

    def replay(self) -> None: ...


@contextmanager
def capture(_: Graph) -> Iterator[None]:
    yield


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, and `torch.cuda` on the CPU."""
    stand_ins = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda _: None,
        "current_stream": lambda *_: Stream(),
        "synchronize": lambda *_: None,
        "_sleep": lambda _: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, unpinned(getattr(torch, name)))
    monkeypatch.setattr(benchmarks, "ARENA_BYTES", 2**20)
    monkeypatch.setattr(benchmarks, "COPY_BYTES", (4096, 2**20))
    monkeypatch.setattr(benchmarks, "DESCRIPTORS", (4, 16))
    monkeypatch.setattr(benchmarks, "GATHER_BYTES", 2**18)
    monkeypatch.setattr(benchmarks, "MIB", 2**10)
    monkeypatch.setattr(benchmarks, "NODES", 5)
    monkeypatch.setattr(benchmarks, "PROGRAMS", (1, 4))
    monkeypatch.setattr(benchmarks, "thread_benchmarks", lambda *_: [])
    monkeypatch.setattr(benchmarks, "_attention", lambda _: lambda: None)


def unpinned(make: Any) -> Any:
    return lambda *sizes, pin_memory=False, **options: make(*sizes, **options)


@pytest.mark.usefixtures("no_device")
def test_every_benchmark_runs_and_a_machine_comes_of_them() -> None:
    found = benchmarks.device_benchmarks(torch.device("cpu"), (1,), repetitions=2)
    places = [(one.name, tuple(one.parameters.items())) for one in found]
    assert len(set(places)) == len(places)
    assert {
        *("dma to device", "dma to host", "dma both ways", "page copies", "submit page copies", "zero-copy"),
        *("device memory", "matmul", "launch", "graph replay", "graph node", "event record", "event wait"),
        *("stream sync", "launch and poll", "read back", "flags there and back"),
        *("attention alone", "attention beside dma", "attention beside zero-copy"),
    } == {one.name for one in found}
    assert all(one.seconds and min(one.seconds) > 0 for one in found)
    assert {one.amount for one in found if one.name == "zero-copy"} == {2.0**18}


@pytest.mark.usefixtures("no_device")
def test_what_compiles_or_fills_its_stream_is_not_delayed_for_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first call that takes seconds, and calls that return only when the delay before them is over."""
    now, delays, pending = [0.0], list[float](), [0.0]

    def sleep(cycles: int) -> None:
        delays.append(cycles / benchmarks.CYCLES_PER_S)
        pending[0] = delays[-1]

    def call() -> None:
        now[0] += pending[0] + (0.01 if delays or now[0] else 2.0)
        pending[0] = 0.0

    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    assert len(benchmarks.device_seconds(call, 10)) == 10
    assert delays == pytest.approx([0.02] * (10 + benchmarks.WARM_UP))


@pytest.mark.usefixtures("no_device")
def test_a_device_is_busy_for_a_while_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls are warm-ups for as long as the device takes to raise its clock."""
    now, called = [0.0], list[float]()

    def call() -> None:
        called.append(now[0])
        now[0] += 0.001

    monkeypatch.setattr(benchmarks.time, "perf_counter", lambda: now[0])
    assert len(benchmarks.device_seconds(call, 5)) == 5
    submitted = 2  # to see how long that takes
    assert called[-5] + 0.001 - called[submitted] == pytest.approx(benchmarks.WARM_S)


@pytest.mark.usefixtures("no_device")
def test_the_link_s_rate_is_that_of_the_best_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clo_calibration.calibrate.local_machine", lambda _: local())
    rows = [
        benchmarks.Benchmark("dma to device", {"bytes": 4e3}, "bytes", 4e3, (1e-6,)),
        benchmarks.Benchmark("dma to device", {"bytes": 4e6}, "bytes", 4e6, (1e-4,)),
        benchmarks.Benchmark("dma to host", {"bytes": 4e6}, "bytes", 4e6, (2e-4,)),
        benchmarks.Benchmark("device memory", {}, "bytes", 1e9, (1e-3,)),
        benchmarks.Benchmark("matmul", {}, "FLOP", 1e12, (1e-2,)),
    ]
    machine = _machine(torch.device("cuda"), rows, "one")
    assert machine.link.h2d_bytes_per_s == pytest.approx(4e10)
    assert machine.link.d2h_bytes_per_s == pytest.approx(2e10)
    assert machine.gpu.hbm_bytes_per_s == pytest.approx(1e12)
    assert machine.gpu.peak_flops_per_s == pytest.approx(1e14)


def local() -> Any:
    from clo.engine.memory import local_machine

    return local_machine(torch.device("cpu"))


@pytest.fixture(scope="module")
def decode_designs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decode_designs", ROOT / "benchmarks" / "decode_designs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_designs"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["clo", "streamed", "resident"])
def test_a_design_s_row_adds_up(decode_designs: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(decode_designs, "SPARE", 20)
    network = Network(small_model())
    row = decode_designs.measured(network, design(name), random_prompt(network, 80), 4, 1e9)
    assert len(row["samples_s"]) == 4
    assert row["pcie_utilisation"] == pytest.approx(row["h2d_bytes_per_step"] / row["tpot_s"] / 1e9)
    assert (row["h2d_bytes_per_step"] > 0) is (name != "resident")
    assert row["timed_tpot_s"] == pytest.approx(sum(row["busy_s"].values()) + sum(row["stalls_s"].values()))
    assert name in decode_designs.line(row)


def test_what_offloads_keeps_as_much_as_is_asked_for(decode_designs: ModuleType) -> None:
    network = Network(small_model())
    for name, budgets, slots in (("clo", 1.0, 2), ("resolve", 3.0, 6), ("clo-v2", 3.0, 2)):
        chosen = decode_designs.sized(design(name, budget_pages=2, slot_pages=None), budgets)
        row = decode_designs.measured(network, chosen, random_prompt(network, 100), 2, 1e9)
        assert row["slot_pages"] == slots, name
    assert decode_designs.sized(design("resident"), 1.0) == design("resident")


def test_as_many_layers_as_fit(decode_designs: ModuleType) -> None:
    deepseek, hybrid = presets.load_model("deepseek-v3"), presets.load_model("qwen3-next-80b-a3b")
    assert decode_designs.fitting(deepseek, 130_816, 120e9, 3).experts is None
    shape = decode_designs.fitting(deepseek, 130_816, 120e9)
    assert shape.num_layers > 3
    assert shape.weight_bytes + 2.5 * 130_816 * shape.num_layers * shape.layer_token_bytes < 120e9
    assert decode_designs.fitting(deepseek, 130_816, 1e15) == deepseek
    assert decode_designs.fitting(hybrid, 130_816, 1.0).num_layers == hybrid.whole_layers[0] + 1


def test_without_a_device_one_line_says_so(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "decode_designs.py")
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, script, "--out", str(tmp_path / "x.json")],
        env=hidden,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr == "decode_designs: --device cuda: torch sees no CUDA device on this machine\n"
