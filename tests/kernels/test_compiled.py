"""The tests of this folder once more, run by what is compiled: see `ptx/`.

The interpreter knows neither warps nor how a compiler rounds, fuses and overlaps, and cannot compute bfloat16.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
WITHIN_A_MINUTE = (
    "test_watched_memory.py",
    "test_rotate.py::test_kernel_and_reference_round_alike",
    "test_hit_test.py",
    "test_resolve_pages.py::test_replacing_whole_sets",
    "test_resolve_pages.py::test_tables_come_out_the_same_again_and_again",
    "test_append_kv.py::test_growing_equals_laying_out_at_once",
    "test_sparse_decode_attention.py::test_sinks_take_their_share",
    "test_ring_doorbell.py",
    "test_wait_ready.py",
)

pytestmark = [
    pytest.mark.skipif("CLO_TEST_COMPILED" in os.environ, reason="these are the tests that it runs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU"),
]


def run(architecture: int, tests: tuple[str, ...], *options: str) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "CLO_TEST_COMPILED": str(architecture),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    paths = [str(HERE / test) for test in tests] or [str(HERE)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *paths]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# by one worker: beside itself it would take as long
@pytest.mark.xdist_group("ptx")
def test_some_as_compiled_for_an_h100():
    run(90, WITHIN_A_MINUTE, "-v")


@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90])
def test_all(architecture):
    run(architecture, (), "-v", "-n", "2")
