"""`make gpu`: refuses without a GPU, and otherwise brings back what it can whatever fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu: no CUDA device")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_step_that_fails_or_hangs_or_lacks_a_package_stops_no_other(gpu: ModuleType, tmp_path: Path) -> None:
    steps = (
        gpu.Step("slow", ("-c", "import time; time.sleep(60)"), 3),
        gpu.Step("bad", ("-c", "print('ouch'); raise SystemExit(3)"), 6),
        gpu.Step("poor", ("-c", "pass"), 20, ("no_such_package",)),
        gpu.Step("good", ("-c", "open(r'{out}/good.txt', 'w').write('{seconds}')"), 6),
    )
    results = {o.step: o.result for o in gpu.run_steps(steps, tmp_path, {"device": "test"}, seconds=30)}
    assert results == {
        "slow": "failed: not done after 6 s",
        "bad": "failed: exit code 3",
        "poor": "skipped: not installed: no_such_package",
        "good": "passed",
    }
    assert (tmp_path / "good.txt").exists()
    assert "ouch" in (tmp_path / "log.txt").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert all(f"| {step} | {result} |" in summary for step, result in results.items())


@pytest.mark.parametrize(("ends", "code"), [((0, 0), 0), ((0, 3), 1)])
def test_the_exit_code_says_whether_a_step_failed(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: tuple[int, ...], code: int
) -> None:
    steps = tuple(gpu.Step(f"step{n}", ("-c", f"raise SystemExit({end})"), 6) for n, end in enumerate(ends))
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "probe", lambda: {"device": "test"})
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "1"]) == code
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["device"] == "test"


def test_a_step_whose_time_is_over_may_still_say_what_it_found(gpu: ModuleType, tmp_path: Path) -> None:
    code = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(pathlib.Path(r'{out}/found').write_text('so far')))
time.sleep(60)
"""
    outcome = gpu.run_step(gpu.Step("slow", ("-c", code), 20), tmp_path, 6)
    assert (outcome.result, outcome.seconds < 7) == ("failed: not done after 6 s", True)
    assert (tmp_path / "found").read_text() == "so far"


def test_a_step_ends_by_itself_as_long_before_its_limit_as_it_says(gpu: ModuleType, tmp_path: Path) -> None:
    for last_s, seconds in ((30.0, "70"), (18.0, "82")):
        step = gpu.Step("step", ("-c", "open(r'{out}/seconds', 'w').write('{seconds}')"), 20, last_s=last_s)
        assert gpu.run_step(step, tmp_path, 100).result == "passed"
        assert (tmp_path / "seconds").read_text() == seconds


def test_minutes_scale_every_limit_and_what_is_left_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, given, used = [1000.0], {}, {"first": 20.0, "lacking": 0.0, "second": 90.0, "last": 1.0}
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run_step(step: Any, out: Path, limit_s: float) -> Any:
        given[step.name] = limit_s
        now[0] += used[step.name]
        return gpu.Outcome(step.name, "passed", used[step.name])

    monkeypatch.setattr(gpu, "run_step", run_step)
    steps = [
        gpu.Step(name, (), share, needs)
        for name, share, needs in (
            ("first", 30, ()), ("lacking", 30, ("no_such_package",)), ("second", 10, ()), ("last", 10, ()),
        )
    ]  # fmt: skip
    gpu.run_steps(steps, tmp_path, {}, seconds=100)
    assert given == {"first": pytest.approx(60), "second": pytest.approx(60)}  # what is over time took from the last
    used["second"], now[0] = 20.0, 0.0
    gpu.run_steps(steps, tmp_path, {}, seconds=200)
    assert given == {"first": pytest.approx(120), "second": pytest.approx(140), "last": pytest.approx(160)}


def test_children_see_the_callers_path_after_the_sources(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/the/callers")
    step = gpu.Step("path", ("-c", "import os; open(r'{out}/path', 'w').write(os.environ['PYTHONPATH'])"), 20)
    assert gpu.run_step(step, tmp_path, 20).result == "passed"
    first, *_, last = (tmp_path / "path").read_text().split(os.pathsep)
    assert (Path(first).resolve(), last) == (SCRIPT.parent.parent.resolve(), "/the/callers")


def test_where_home_takes_no_files_kernels_are_kept_beside_the_results(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu.kernel_cache(tmp_path / "out") == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert gpu.kernel_cache(tmp_path / "out") == {"TRITON_CACHE_DIR": str(tmp_path / "out" / "triton-cache")}
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    assert gpu.kernel_cache(tmp_path / "out") == {}


def test_no_step_begins_when_time_is_over(gpu: ModuleType, tmp_path: Path) -> None:
    steps = (gpu.Step("late", ("-c", "raise SystemExit(1)"), 20),)
    assert gpu.run_steps(steps, tmp_path, {}, seconds=0)[0].result == "skipped: no time left"


def test_figures_reach_the_summary(gpu: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "kernels/bench.py", "--quick", "--out", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=SCRIPT.parent.parent, check=True, capture_output=True)
    bench = json.loads((tmp_path / "bench.json").read_text())
    bench["goals"] = [{"goal": "fast", "found": str(met), "met": met} for met in (True, False, None)]
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    summary = gpu.summary({"device": "test"}, [], tmp_path)
    assert f"{bench['figures'][0]['median_us']:.2f}" in summary
    assert "81 of 81 agree" in summary
    assert "- met: fast: True\n- MISSED: fast: False\n- not timed: fast: None\n" in summary


def test_the_summary_orders_the_designs_that_offload(gpu: ModuleType) -> None:
    rows = [
        {"design": "resident", "offloads": False, "tpot_s": 1e-3},
        {"design": "resolve", "offloads": True, "tpot_s": 6e-3},
        {"design": "clo", "offloads": True, "tpot_s": 4e-3},
    ]
    assert gpu.order_lines(rows) == ["Fastest of those that offload: clo; resolve +50%"]
    assert gpu.order_lines(rows[:1]) == []
    assert gpu.order_lines(rows[2:]) == ["Fastest of those that offload: clo"]


def test_steps_fit_eight_minutes_and_their_files_exist(gpu: ModuleType) -> None:
    assert sum(step.share_s for step in gpu.STEPS) == 8 * 60
    for step in gpu.STEPS:
        for part in step.command:
            if part.startswith(("tests/", "kernels/", "benchmarks/")):
                assert (SCRIPT.parent.parent / part).exists(), part
