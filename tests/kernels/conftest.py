"""Kernels run on the GPU where there is one, else in Triton's interpreter, which `tests/conftest.py` has chosen.

With TRITON_INTERPRET=0 and no GPU the same tests run the reference through the wrappers. With CLO_TEST_COMPILED=90
besides they run what is compiled for GPUs of compute capability 9.0, instruction by instruction (`ptx/`).
"""

import importlib.util
import os

import pytest
import torch

if "CLO_TEST_COMPILED" in os.environ:
    from tests.kernels.ptx.launches import install

    install(int(os.environ["CLO_TEST_COMPILED"]))

# Triton has no wheels beyond Linux
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
