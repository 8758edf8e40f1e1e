"""`make gpu`: refuses without a GPU, and otherwise brings back what it can whatever fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
        gpu.Step("bad", ("-c", "print('ouch'); raise SystemExit(3)"), 20),
        gpu.Step("slow", ("-c", "import time; time.sleep(60)"), 6),
        gpu.Step("poor", ("-c", "pass"), 20, ("no_such_package",)),
        gpu.Step("good", ("-c", "open(r'{out}/good.txt', 'w').write('{seconds}')"), 20),
    )
    results = {o.step: o.result for o in gpu.run_steps(steps, tmp_path, {"device": "test"}, seconds=40)}
    assert results == {
        "bad": "failed: exit code 3",
        "slow": "failed: not done after 6 s",
        "poor": "skipped: not installed: no_such_package",
        "good": "passed",
    }
    assert (tmp_path / "good.txt").exists()
    assert "ouch" in (tmp_path / "log.txt").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert all(f"| {step} | {result} |" in summary for step, result in results.items())


def test_no_step_begins_when_time_is_over(gpu: ModuleType, tmp_path: Path) -> None:
    steps = (gpu.Step("late", ("-c", "raise SystemExit(1)"), 20),)
    assert gpu.run_steps(steps, tmp_path, {}, seconds=0)[0].result == "skipped: no time left"


def test_figures_reach_the_summary(gpu: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "kernels/bench.py", "--quick", "--out", str(tmp_path / "bench.json")]
    subprocess.run(command, cwd=SCRIPT.parent.parent, check=True, capture_output=True)
    summary = gpu.summary({"device": "test"}, [], tmp_path)
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert f"{bench['figures'][0]['median_us']:.2f}" in summary
    assert "39 of 39 agree" in summary


def test_steps_fit_eight_minutes_and_their_files_exist(gpu: ModuleType) -> None:
    assert sum(step.limit_s for step in gpu.STEPS) <= 8 * 60 + 10
    for step in gpu.STEPS:
        for part in step.command:
            if part.startswith(("tests/", "kernels/", "benchmarks/")):
                assert (SCRIPT.parent.parent / part).exists(), part
