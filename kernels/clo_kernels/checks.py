"""Argument checks of the wrappers: every message names the argument, its value and what was expected."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256
LARGEST_VECTOR_DIM = 1024
"""Of a vector that all query heads share (latent attention)."""


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """A contiguous tensor of this shape (-1: any size), of one of these dtypes, on this device (None: any)."""
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    require(tensor.dtype in allowed, f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))}")
    fits = tensor.dim() == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, tensor.shape, strict=False)
    )
    require(fits, f"{name}: shape {list(tensor.shape)}, expected {['any' if n < 0 else n for n in shape]}")
    require(tensor.is_contiguous(), f"{name}: strides {list(tensor.stride())} are not contiguous")
    if device is not None:
        require(tensor.device == device, f"{name}: on {tensor.device}, expected {device}")


def check_host_tensor(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A tensor that kernels on `device` can read: on it, or in pinned host memory."""
    # an empty tensor has no address that could be pinned, and nothing to read
    pinned = device.type == "cuda" and tensor.device.type == "cpu" and (tensor.numel() == 0 or tensor.is_pinned())
    require(tensor.device == device or pinned, f"{name}: on {tensor.device}, expected {device} or pinned host memory")


def check_head_dim(name: str, head_dim: int, most: int = LARGEST_HEAD_DIM) -> None:
    """Kernels hold a head vector in a block and read it 16 bytes at a time."""
    require(
        16 <= head_dim <= most and head_dim % 8 == 0,
        f"{name}: head_dim = {head_dim}, expected a multiple of 8 from 16 to {most}",
    )


def group_size(num_query_heads: int, num_kv_heads: int) -> int:
    """Query heads that share a KV head."""
    require(
        num_kv_heads > 0 and num_query_heads > 0 and num_query_heads % num_kv_heads == 0,
        f"num_query_heads = {num_query_heads} must be a multiple of num_kv_heads = {num_kv_heads}",
    )
    return num_query_heads // num_kv_heads
