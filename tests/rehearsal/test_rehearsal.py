"""The CUDA engine's tests once more, where torch is built for CUDA and there is no GPU: see `run.py`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DECODER = "tests/engine/test_cuda_decoder.py"


def built_for() -> str | None:
    """The version of CUDA that torch is built for."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return None if torch.cuda.is_available() else torch.version.cuda


needs_cuda_build = pytest.mark.skipif(
    not str(built_for()).startswith("13."), reason="needs torch built for CUDA 13, on a machine without a GPU"
)


def rehearse(arguments: Sequence[str]) -> str:
    command = [sys.executable, str(HERE / "run.py"), *arguments]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@needs_cuda_build
@pytest.mark.long
def test_the_cuda_decoder():
    said = rehearse(["-m", "pytest", "-p", "no:cacheprovider", "-v", DECODER])
    assert int(re.search(r"(\d+) passed", said)[1]) > 100


@needs_cuda_build
def test_what_a_capture_forbids():
    rehearse([str(HERE / "captures.py")])


@needs_cuda_build
@pytest.mark.long
def test_steps_with_compiled_kernels():
    assert "largest error" in rehearse(["--kernels", "compiled", str(HERE / "compiled_steps.py")])


def test_other_builds_are_refused():
    if str(built_for()).startswith("13."):
        pytest.skip("this one is right")
    done = subprocess.run([sys.executable, str(HERE / "run.py"), "-c", ""], capture_output=True, text=True)
    assert done.returncode == 2
    assert "lacks torch built for CUDA 13" in done.stderr
