"""Output to readers that leave, full disks, pipes, terminals and narrow windows."""

from __future__ import annotations

import io
import os
import pty
import subprocess
from pathlib import Path

import pytest
from commands import CLO, SMALL
from rich.console import Console

import clo_sim
from clo_cli.tables import design_table

WRITERS = [["simulate", "--steps", "2"], ["simulate", "--steps", "2", "--json"], ["--help"], []]


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_reader_that_has_gone_ends_quietly(arguments: list[str]) -> None:
    process = subprocess.Popen([*CLO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLO, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.stderr == b"clo: error: output: No space left on device\n"
    assert done.returncode == 2


def test_stderr_of_a_pipe_stays_empty() -> None:
    arguments = ["explore", *SMALL, "--designs", "clo", "--no-sweep"]
    done = subprocess.run([*CLO, *arguments], capture_output=True, timeout=120, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize("width", [80, 100, 149, 150, 160, 200])
def test_no_column_is_cut_off(width: int) -> None:
    scene = clo_sim.make_scene(context_tokens=32768, batch=4)
    results = [clo_sim.simulate(scene, name, executor="clock") for name in ("clo", "recall", "streamed")]
    long = "clo prefetch_depth=1 transfer=cpu_zero_copy"
    results.append(results[0].with_fields(design=results[0].design.with_fields(name=long)))
    out = Console(width=width, file=io.StringIO(), record=True)
    out.print(design_table(results, "designs", width))
    text = out.export_text()
    assert all(line.endswith("│") for line in text.splitlines() if line.startswith("│"))
    assert "…" not in text
    assert "on-demand" in text


def test_a_terminal_is_told_of_what_takes_long() -> None:
    shown, terminal = pty.openpty()
    arguments = ["simulate", "--steps", "1", "--warmup", "1", "--synthetic", "--intervals", "--executor", "clock"]
    with subprocess.Popen([*CLO, *arguments], stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        said = b""
        while piece := _read(shown):
            said += piece
    os.close(shown)
    assert process.returncode == 0
    for phase in ("fitting a workload", "generating steps", "simulating", "prediction intervals"):
        assert phase.encode() in said


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody writes to it any more
        return b""
