"""Who runs: the kernel on a GPU or in the interpreter, else the reference."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clo_kernels import dispatch, hit_test, reference
from tests.kernels.helpers import DEVICE

# nothing that a second run would show
APART = ("test_ptx.py", "test_ptx_instructions.py", "test_compiled.py", "test_bench.py", "test_sanitizer.py")


def test_the_kernel_runs_here_and_not_the_reference(monkeypatch):
    if not dispatch.runs_kernel(torch.zeros(1, device=DEVICE)):
        pytest.skip("TRITON_INTERPRET=0: these tests run the reference")
    monkeypatch.setattr(reference, "hit_test", None)
    query = torch.randn(1, 2, 16, device=DEVICE)
    assert hit_test.hit_test(query, query.clone(), torch.zeros(1, device=DEVICE)).tolist() == [[False]]


OPERATIONS = (
    *("hit_test", "score_pages", "select_pages", "resolve_pages", "gather_pages", "sparse_decode_attention"),
    *("append_kv", "ring_doorbell", "wait_ready"),
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_reference_takes_what_the_wrapper_takes(name):
    """Same names, order and kinds; wrappers alone have defaults."""
    wrapper, specification = (
        [(parameter.name, parameter.kind) for parameter in inspect.signature(function).parameters.values()]
        for function in (getattr(importlib.import_module(f"clo_kernels.{name}"), name), getattr(reference, name))
    )
    assert wrapper == specification


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "0", reason="is what runs already")
@pytest.mark.skipif(DEVICE == "cuda", reason="says nothing of a GPU, whose time it would take")
def test_wrappers_run_the_reference_on_the_cpu_without_the_interpreter():
    """All tests of operations again, where a launch would fail: there is no GPU for it."""
    folder = Path(__file__).parent
    files = [str(path) for path in folder.glob("test_*.py") if path.name not in (*APART, Path(__file__).name)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    run = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
