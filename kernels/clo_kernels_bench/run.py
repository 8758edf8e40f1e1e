"""Runs the bench: correctness, then sections of figures, each as long as time is left. Writes nothing."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from clo_kernels_bench import on_cpu
from clo_kernels_bench.attention import attention_figures
from clo_kernels_bench.correctness import verdicts
from clo_kernels_bench.figures import Figure, Report
from clo_kernels_bench.goals import goals
from clo_kernels_bench.host_costs import flag_figures, host_figures
from clo_kernels_bench.peaks import Peaks, measure_peaks, sheet_bytes_per_s
from clo_kernels_bench.selection import resolve_figures, selection_figures
from clo_kernels_bench.shared_vectors import shared_vector_figures
from clo_kernels_bench.small_operations import small_operation_figures
from clo_kernels_bench.transfers import gather_figures, interference_figures, pinned_storage

Say = Callable[[str], None]
Section = Callable[[], Iterator[Figure]]
COMPILER = Path(__file__).with_name("compiled.py")
BULK_READER = Path(__file__).with_name("bulk_reads.py")


def environment() -> dict[str, Any]:
    """Where and with what this ran."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "cpu",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": "cuda",
            "device_name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "memory_bytes_per_s_by_clock": sheet_bytes_per_s(torch.device("cuda", 0)),
            "cuda": torch.version.cuda,
        }
    return found


def run(report: Report, say: Say, *, quick: bool, seconds: float, save: Callable[[], None]) -> None:
    """Fill `report`. `save` is called after each section, so that a run cut short leaves what it has."""
    end = time.monotonic() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", 0 if torch.cuda.is_available() else None)
    try:
        for verdict in verdicts(device):
            report.correctness.append(verdict)
            if not verdict.passed:
                say(f"WRONG {verdict.operation} ({verdict.case}): {verdict.detail}")
    except Exception as error:  # a device that is lost with one operation has no inputs for the next
        report.failed.append("correctness")
        report.left_out.append(f"everything else: {type(error).__name__}: {str(error)[:500]}")
        save()
        return
    passed = sum(verdict.passed for verdict in report.correctness)
    say(f"correctness: {passed} of {len(report.correctness)} agree with the reference")
    save()
    for name, section in _sections(report, device, end, quick=quick, say=say).items():
        try:
            if time.monotonic() > end:
                report.left_out.append(f"{name}: no time left of {seconds:.0f} s")
            else:
                _run_section(report, name, section, end, say)
        finally:  # an interrupt loses nothing either
            report.goals = [goal.as_json() for goal in goals(report.figures)] if device.type == "cuda" else []
            save()
    if device.type == "cuda":
        say("\n".join(["", *(goal.line() for goal in goals(report.figures))]))


def _run_section(report: Report, name: str, section: Section, end: float, say: Say) -> None:
    say(f"\n{name}")
    try:
        for figure in section():
            wrong = [operation for operation in report.failed_operations if operation in figure.operation]
            if wrong:
                report.left_out.append(f"{figure.operation}: no figure, since {wrong[0]} is wrong")
                continue
            report.figures.append(figure)
            say(figure.line())
            if time.monotonic() > end:
                report.left_out.append(f"{name}: no time left after {figure.operation} {dict(figure.case)}")
                return
    except Exception as error:  # whatever the compiler or the driver raises: the other sections go on
        report.failed.append(name)
        report.left_out.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        say(f"failed: {report.left_out[-1]}")


def _sections(report: Report, device: torch.device, end: float, *, quick: bool, say: Say) -> dict[str, Section]:
    """What is asked most often comes first."""
    if device.type == "cpu":
        return {"references on the CPU": lambda: on_cpu.reference_figures(quick=quick)}
    known: dict[str, Any] = {}

    def peaks() -> Iterator[Figure]:
        known["peaks"], figures = measure_peaks(device, quick=quick)
        yield from figures

    def limits() -> Peaks:
        found: Peaks = known["peaks"]
        return found

    def storage() -> torch.Tensor:
        if "storage" not in known:
            known["storage"] = pinned_storage(device)
        pinned: torch.Tensor = known["storage"]
        return pinned

    def note(text: str) -> None:
        report.left_out.append(text)
        say(text)

    return {
        "limits of this machine": peaks,
        "pages from the host": lambda: gather_figures(storage(), device, limits(), quick=quick),
        "gate and resolve, 32 layers in one graph": lambda: resolve_figures(device, quick=quick),
        "attention": lambda: attention_figures(device, limits(), quick=quick, note=note),
        "attention beside a transfer": lambda: interference_figures(storage(), device, quick=quick),
        "pages from the host by bulk reads": lambda: _bulk_reads(limits(), end, note),
        "flags": lambda: flag_figures(device, quick=quick),
        "launches and synchronisation": lambda: host_figures(device, quick=quick),
        "scores and selection": lambda: selection_figures(device, limits(), quick=quick),
        "vectors that are key and value in one": lambda: shared_vector_figures(device, limits(), quick=quick),
        "what a layer does to one token beside": lambda: small_operation_figures(device, quick=quick),
        "registers and shared memory": lambda: _compiled(report, end, say),
    }


def _compiled(report: Report, end: float, say: Say) -> Iterator[Figure]:
    """The compiler's report, by a process of its own that is ended when the time is over; no figures."""
    major, minor = torch.cuda.get_device_capability()
    left = max(1.0, end - time.monotonic())
    try:
        report.kernels.extend(compiled_kernels(10 * major + minor, limit_s=left))
    except subprocess.TimeoutExpired:
        report.left_out.append(f"registers and shared memory: not done after {left:.0f} s")
        say(report.left_out[-1])
        return
    for kernel in report.kernels:
        say(
            f"{kernel['kernel']:24} {kernel['registers']} registers  {kernel['shared_bytes']:6} bytes of shared memory"
            f"  {kernel['spill_bytes']} bytes spilled"
        )
    spilling = [kernel["kernel"] for kernel in report.kernels if kernel["spill_bytes"]]
    assert not spilling, f"these kernels spill registers: {', '.join(spilling)}"
    yield from ()


def _bulk_reads(peaks: Peaks, end: float, note: Say) -> Iterator[Figure]:
    """What another way to read the host would reach. That it is refused is a finding, not a failure of the bench."""
    if torch.cuda.get_device_capability() < (9, 0):
        note("pages from the host by bulk reads: need compute capability 9.0")
        return
    try:
        figures = json.loads(_of_its_own(BULK_READER, limit_s=max(1.0, end - time.monotonic())))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        note(f"pages from the host by bulk reads: {error}")
        return
    for figure in figures:
        yield Figure(
            operation=figure["operation"],
            case=figure["case"],
            samples_us=tuple(figure["samples_us"]),
            num_bytes=figure["num_bytes"],
            limit_us=peaks.copy_us(figure["num_bytes"]),
            limit=peaks.copy_limit,
        )


def compiled_kernels(architecture: int, *, limit_s: float) -> list[dict[str, Any]]:
    """Registers, shared memory and spills of every kernel for sm_`architecture`.

    Raises `RuntimeError`, or `subprocess.TimeoutExpired` after `limit_s`.
    """
    kernels: dict[str, dict[str, Any]] = json.loads(_of_its_own(COMPILER, str(architecture), limit_s=limit_s))
    return [{"kernel": name} | {k: v for k, v in entry.items() if k != "ptx"} for name, entry in kernels.items()]


def _of_its_own(script: Path, *arguments: str, limit_s: float) -> str:
    """What a script prints in a process of its own, without the interpreter. Raises as `compiled_kernels` does."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return done.stdout
