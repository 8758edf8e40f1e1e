"""Everything that needs a GPU, in one command and one folder: `make gpu`, or `python3 benchmarks/gpu.py`.

Runs each step of STEPS as a process of its own, with a time limit of its own, in the Python that runs this: torch,
Triton and pytest must be there, nothing is installed. A step that fails, or that lacks a package, does not stop the
others. `--minutes` are divided among the steps that can run, by their shares; what a step leaves unspent goes to those
after it. The folder is out/gpu/<device>-<date>/ unless `--out` names one:

    environment.json   the machine and the versions
    summary.md         what passed, and every figure beside its limit; written anew after each step
    log.txt            what the steps printed
    *.xml, *.json      results of tests (JUnit), of benches, and of the decoder with 128K tokens
    profile.json       what `clo calibrate` fitted, and verdict/, what `clo validate` says of it

Without a CUDA device: one line, exit code 2. Exit code 1 if a step failed. More steps go into STEPS, most wanted first.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (".", "sim", "kernels", "calibration", "plots", "cli")
PROBE = """
import json, platform, sys, torch
found = {"python": sys.version, "platform": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "numpy", "transformers", "hypothesis", "pytest", "xdist"):
    try:
        found[name] = getattr(__import__(name), "__version__", "unknown")
    except ImportError:
        found[name] = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "capability": [p.major, p.minor], "memory_bytes": p.total_memory,
              "multiprocessors": p.multi_processor_count}
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Step:
    """A command of this Python. {out} and {seconds} are filled in; `needs` are packages it cannot do without."""

    name: str
    command: tuple[str, ...]
    share_s: float
    """Of eight minutes."""
    needs: tuple[str, ...] = ()
    last_s: float = 30.0
    """{seconds} ends so long before the step does: what has begun by then takes no longer."""
    workers: int = 12
    """Processes that tests run in. They take turns on the device: a kernel that waits for a flag uses up its turn."""


PYTEST = (
    *("-m", "pytest", "-m", "not long and not model", "--durations=10", "-p", "no:cacheprovider"),
    # names as tests end, and where threads are in one that hangs: a step that is cut off says that much
    *("-vv", "--tb=short", "-o", "faulthandler_timeout=45"),
)
CLO = ("-m", "clo_cli.main")
CLO_NEEDS = ("transformers", "pydantic", "triton", "scipy", "simpy", "click", "rich", "matplotlib")
GRACE_S = 10.0
"""A step whose time is over is interrupted first, and ended after this: tests say what has failed so far."""
NO_GPU = ("test_ptx.py", "test_bench.py", "test_sanitizer.py")
"""Of the kernels' tests, those that need none, and one that is a step of its own."""
QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Of the device, that streams share (8 unless this says otherwise): a copy behind a kernel that waits for it hangs."""
QUICK = ("--designs", "resident,resolve,clo")
# The shares are guesses until a GPU has timed them: the later steps live on what tests leave unspent, or on --minutes.
STEPS = (
    Step(
        "bench",
        ("kernels/bench.py", "--out", "{out}/bench.json", "--seconds", "{seconds}"),
        130,
        ("triton",),
        last_s=18.0,  # a figure takes a second or two, and what an interrupt finds is written
    ),
    Step(
        "kernel-tests",
        (
            *(*PYTEST, "tests/kernels", "--junitxml={out}/kernel-tests.xml"),
            *(f"--ignore=tests/kernels/{name}" for name in NO_GPU),
        ),
        65,
        ("pytest", "hypothesis", "triton"),
    ),
    Step(
        "engine-tests",
        (*PYTEST, "tests/engine/test_cuda_decoder.py", "--junitxml={out}/engine-tests.xml"),
        70,
        ("pytest", "transformers", "pydantic", "triton"),
        workers=5,
    ),
    Step(
        "decode-128k",
        ("benchmarks/decode_designs.py", "--out", "{out}/decode.json", "--seconds", "{seconds}"),
        65,
        ("transformers", "pydantic", "triton"),
    ),
    Step(
        "calibrate",
        (*CLO, "calibrate", "--device", "cuda", "--out", "{out}/profile.json", "--rounds", "1", *QUICK),
        62,
        CLO_NEEDS,
    ),
    Step(
        "validate",
        (*CLO, "validate", "--profile", "{out}/profile.json", "--out", "{out}/verdict", "--rounds", "1", *QUICK),
        38,
        CLO_NEEDS,
    ),
    Step(
        "decode-128k-latent",
        (
            *("benchmarks/decode_designs.py", "--model", "deepseek-v3", "--layers", "3"),
            *("--out", "{out}/decode-latent.json", "--seconds", "{seconds}"),
        ),
        20,
        ("transformers", "pydantic", "triton"),
        last_s=10.0,
    ),
    Step("memory-checker", (*PYTEST, "tests/kernels/test_sanitizer.py", "-rs"), 30, ("pytest", "triton"), workers=1),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended."""

    step: str
    result: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="results folder (default out/gpu/<device>-<date>)")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (default 8)")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="only these steps")
    options = parser.parse_args(arguments)
    environment = probe()
    if isinstance(environment, str):
        print(f"make gpu: {environment}", file=sys.stderr)
        return 2
    now = datetime.datetime.now(datetime.UTC)
    environment["date"] = now.isoformat(timespec="seconds")
    environment["packages_missing"] = sorted({n for step in STEPS for n in step.needs if not installed(n)})
    environment |= builders()
    device = re.sub(r"\W+", "-", str(environment["device"])).strip("-").lower()
    out = (options.out or ROOT / "out" / "gpu" / f"{device}-{now:%Y%m%d-%H%M%S}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    outcomes = run_steps(steps, out, environment, seconds=60 * options.minutes)
    print(f"\nresults: {out}")
    return 1 if any(outcome.result.startswith("failed") for outcome in outcomes) else 0


def probe() -> dict[str, object] | str:
    """The machine, or why there is nothing to run on it."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        return f"{sys.executable} cannot use torch ({reason[0]}): name another with make gpu PYTHON=..."
    found: dict[str, object] = json.loads(done.stdout)
    return found if "device" in found else f"no CUDA device that torch {found['torch']} of {sys.executable} can use"


def builders() -> dict[str, object]:
    """What Triton builds its launchers with when a kernel first runs: without these no kernel does."""
    compilers = (os.environ.get("CC"), "gcc", "clang")
    return {
        "c_compiler": next((found for name in compilers if name and (found := shutil.which(name))), None),
        "python_headers": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    }


def kernel_cache(out: Path) -> dict[str, str]:
    """Where Triton may not keep what it compiles where it usually does: a folder that all steps share."""
    if "TRITON_CACHE_DIR" in os.environ:
        return {}
    usual = Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=usual).close()
    except OSError:
        return {"TRITON_CACHE_DIR": str(out / "triton-cache")}
    return {}


def installed(package: str) -> bool:
    """Whether this Python can import it."""
    return importlib.util.find_spec(package) is not None


def run_steps(steps: Sequence[Step], out: Path, environment: dict[str, object], *, seconds: float) -> list[Outcome]:
    """One after another, each within its share and what others left; the summary is whole after each."""
    end, outcomes = time.monotonic() + seconds, []
    missing = {step.name: [name for name in step.needs if not installed(name)] for step in steps}
    waiting = sum(step.share_s for step in steps if not missing[step.name])
    unit = seconds / max(waiting, 1e-9)
    for step in steps:
        print(f"\n== {step.name}", flush=True)
        waiting -= 0 if missing[step.name] else step.share_s
        left = end - time.monotonic() - unit * waiting
        if missing[step.name]:
            outcome = Outcome(step.name, f"skipped: not installed: {', '.join(missing[step.name])}", 0.0)
        elif left < 5:
            outcome = Outcome(step.name, "skipped: no time left", 0.0)
        else:
            outcome = run_step(step, out, left)
        print(f"{step.name}: {outcome.result} after {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        (out / "summary.md").write_text(summary(environment, outcomes, out), encoding="utf-8")
    return outcomes


def run_step(step: Step, out: Path, limit_s: float) -> Outcome:
    """One process group, ended when its time is over. What it prints goes to the log and to the terminal."""
    values = {"out": str(out), "seconds": f"{max(1.0, limit_s - step.last_s):.0f}"}
    command = [sys.executable, *(part.format(**values) for part in step.command)]
    if "pytest" in step.command and step.workers > 1 and installed("xdist"):
        # tests that share something costly are a group; the others go to whoever is free
        command += ["-n", str(min(step.workers, os.cpu_count() or 1)), "--dist", "loadgroup"]
    paths = [str(ROOT / folder) for folder in SOURCES] + list(filter(None, [os.environ.get("PYTHONPATH")]))
    variables = {
        **QUEUES,
        **kernel_cache(out),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    begun, log = time.monotonic(), out / "log.txt"
    with log.open("ab") as stream:
        stream.write(f"\n== {step.name}: {' '.join(command)}\n".encode())
        stream.flush()
        at = stream.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        grace = min(GRACE_S, limit_s / 6)
        try:
            result = "passed" if process.wait(limit_s - grace) == 0 else f"failed: exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            result = f"failed: not done after {limit_s:.0f} s"
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = log.read_bytes()[at:].decode(errors="replace")
    print("\n".join(said.splitlines()[-40:]), flush=True)
    return Outcome(step.name, result, time.monotonic() - begun)


def summary(environment: dict[str, object], outcomes: Sequence[Outcome], out: Path) -> str:
    """For people: the steps, then every figure of the bench."""
    lines = [f"# {environment.get('device')}", ""]
    lines += [f"- {name}: {value}" for name, value in environment.items()]
    lines += ["", "| Step | Result | Seconds |", "|---|---|---|"]
    lines += [f"| {outcome.step} | {outcome.result} | {outcome.seconds:.0f} |" for outcome in outcomes]
    if (out / "bench.json").exists():
        lines += ["", *bench_lines(json.loads((out / "bench.json").read_text(encoding="utf-8")))]
    for decode in (out / name for name in ("decode.json", "decode-latent.json")):
        if decode.exists():
            lines += ["", *decode_lines(json.loads(decode.read_text(encoding="utf-8")))]
    if (out / "verdict" / "verdict.md").exists():
        lines += ["", (out / "verdict" / "verdict.md").read_text(encoding="utf-8")]
    return "\n".join(lines) + "\n"


def decode_lines(decode: dict[str, object]) -> list[str]:
    """The designs' steps as a table."""
    rows, left_out = decode["designs"], decode["left_out"]
    assert isinstance(rows, list)
    assert isinstance(left_out, list)
    lines = [f"{decode['model']}, {decode['layers']} layers, {decode['context_tokens']} tokens", ""]
    lines += ["| Design | TPOT ms | p90 | Link | MB a step | Stalls, ms |", "|" + "---|" * 6]
    for row in rows:
        stalls = ", ".join(
            f"{cause} {seconds * 1e3:.2f}" for cause, seconds in row["stalls_s"].items() if seconds > 1e-5
        )
        cells = [
            row["design"],
            f"{row['tpot_s'] * 1e3:.2f}",
            f"{row['tpot_p90_s'] * 1e3:.2f}",
            f"{row['pcie_utilisation']:.0%}",
            f"{row['h2d_bytes_per_step'] / 1e6:.1f}",
            stalls,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *order_lines(rows), *(f"- left out: {line}" for line in left_out)]


def order_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The offloading designs from the fastest on, and how much longer each takes."""
    offloading = sorted((row for row in rows if row["offloads"]), key=lambda row: row["tpot_s"])
    if not offloading:
        return []
    best, *others = offloading
    behind = ", ".join(f"{row['design']} {row['tpot_s'] / best['tpot_s'] - 1:+.0%}" for row in others)
    return [f"Fastest of those that offload: {best['design']}" + (f"; {behind}" if behind else "")]


def bench_lines(bench: dict[str, list[dict[str, object]]]) -> list[str]:
    """The bench's verdicts and figures as tables."""
    wrong = [f"{v['operation']} ({v['case']}): {v['detail']}" for v in bench["correctness"] if not v["passed"]]
    lines = [f"Correctness: {len(bench['correctness']) - len(wrong)} of {len(bench['correctness'])} agree."]
    lines += [f"- wrong: {line}" for line in wrong] + [f"- left out: {line}" for line in bench["left_out"]]
    states = {True: "met", False: "MISSED", None: "not timed"}
    lines += [f"- {states[goal['met']]}: {goal['goal']}: {goal['found']}" for goal in bench["goals"]]
    lines += ["", "| Operation | Case | Median us | Min | p90 | GB/s | Limit us | Share | Limit |", "|" + "---|" * 9]
    for figure in bench["figures"]:
        case = figure["case"]
        assert isinstance(case, dict)
        cells = [
            figure["operation"],
            ", ".join(f"{name} {value}" for name, value in case.items()),
            *(_number(figure[key], 1.0) for key in ("median_us", "min_us", "p90_us")),
            _number(figure["bytes_per_s"], 1e9),
            _number(figure["limit_us"], 1.0),
            _number(figure["share_of_limit"], 1.0),
            figure["limit"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _number(value: object, unit: float) -> str:
    return f"{value / unit:.2f}" if isinstance(value, int | float) else ""


if __name__ == "__main__":
    sys.exit(main())
