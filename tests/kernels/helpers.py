"""Where kernels run in tests, how closely results must agree, and shapes that every test of a kind uses."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 arithmetic is wrong in the interpreter
COMPILED = DEVICE == "cuda" or "CLO_TEST_COMPILED" in os.environ
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if COMPILED else [])
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


def by_dtype(test):
    return pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))(test)


def cases(names, *rows):
    """Parametrize with ids made of names and values: batch3-group7."""
    keys = names.split()
    ids = ["-".join(f"{k}{v}" for k, v in zip(keys, row, strict=True)) for row in rows]
    return pytest.mark.parametrize(",".join(keys), rows, ids=ids)
