"""Kernels run on the GPU where there is one, else in Triton's interpreter, which `tests/conftest.py` has chosen.

With TRITON_INTERPRET=0 and no GPU the same tests run the reference through the wrappers.
"""

import importlib.util

import pytest
import torch

# Triton has no wheels beyond Linux
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
