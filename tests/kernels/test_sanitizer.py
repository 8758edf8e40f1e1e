"""Operations under CUDA's memory checker, where there is a GPU and a checker that can watch it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.helpers import needs_gpu

SCRIPT = Path(__file__).with_name("sanitized.py")
CHECKER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
FAULTY = 86


COMMAND = [sys.executable, str(SCRIPT)]


def environment():
    # every tensor an allocation of its own: the checker sees its ends
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_what_is_watched_runs_and_agrees():
    done = subprocess.run(COMMAND, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed=True") == 10 + 11


@needs_gpu
@pytest.mark.skipif(CHECKER is None, reason="needs compute-sanitizer")
def test_the_checker_finds_nothing():
    """Only memory errors: its race checker sees shared memory, and what threads exchange here is in global memory."""
    # calls that fail and are meant to (is this pointer pinned?) are no memory errors
    only_memory = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(FAULTY))
    watched = [CHECKER, *only_memory, *COMMAND]
    done = subprocess.run(watched, env=environment(), capture_output=True, text=True, timeout=240)
    said = done.stdout + done.stderr
    if "Device not supported" in said or "not supported on this" in said:
        pytest.skip("compute-sanitizer cannot watch this device")
    assert done.returncode == 0, said[-4000:]
    assert "ERROR SUMMARY: 0 errors" in said
