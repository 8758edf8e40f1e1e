"""Whether a wrapper runs its kernel or the reference, and on which device. Knows no operation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from triton.runtime.jit import JITFunction


@triton.jit
def _probe() -> None:
    pass


INTERPRETED = not isinstance(_probe, JITFunction)
"""Whether Triton's interpreter runs the kernels: TRITON_INTERPRET was set when they were imported."""


FUSED = {"enable_fp_fusion": True}
"""Launch option: products may be added before they are rounded, whatever a version of Triton does unasked."""
ROUNDED = {"enable_fp_fusion": False}
"""Launch option: every product is rounded, as torch's operations round it."""


def runs_kernel(tensor: torch.Tensor) -> bool:
    """The kernel on CUDA tensors and in the interpreter, the reference on other tensors."""
    return bool(tensor.is_cuda) or INTERPRETED


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
