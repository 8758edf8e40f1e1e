"""Pages in 8 bits: what a row of a coded page holds, how it is made and how it is read. In plain torch.

A row is one token's key or value. It holds a signed code of 8 bits for each value, then a bfloat16 step for each
`STEP_VALUES` of them, which is the largest of their magnitudes / 127: a value is its code times its step. Outliers cost
precision among their neighbours only, and a step has the range of float32. In bfloat16 the product is rounded once.
Groups whose step would be subnormal (below 1.5e-36) are zeros; what is within 0.4% of the largest number of float16 or
bfloat16 may come back infinite.
"""

from __future__ import annotations

import torch

from clo_kernels.checks import FLOATS, require

STEP_VALUES = 16
"""Values that share a step."""
STEP_BYTES = 2
LARGEST_CODE = 127
SMALLEST_STEP = 2.0**-126
"""Smaller ones would be subnormal: they have few bits, and not every device keeps those."""
CODE_DTYPE, STEP_DTYPE = torch.int8, torch.bfloat16


def coded_width(head_dim: int) -> int:
    """Bytes of a row of `head_dim` values: 1.125 a value. Raises `ValueError` where values do not group evenly."""
    require(
        head_dim > 0 and head_dim % STEP_VALUES == 0,
        f"head_dim = {head_dim} must be a multiple of {STEP_VALUES}: so many values of a coded page share a step",
    )
    return head_dim + head_dim // STEP_VALUES * STEP_BYTES


def encode(values: torch.Tensor) -> torch.Tensor:
    """Rows `[..., coded_width(head_dim)]`, int8, of `values` `[..., head_dim]`. What is not finite stays so."""
    require(values.dtype in FLOATS, f"values: dtype {values.dtype}, expected one of {FLOATS}")
    width = coded_width(values.shape[-1])
    groups = values.float().unflatten(-1, (-1, STEP_VALUES))
    step = (groups.abs().amax(-1) / LARGEST_CODE).to(STEP_DTYPE)
    step = torch.where(step < SMALLEST_STEP, 0.0, step)
    divisor = step.float()[..., None]
    code = torch.floor(groups / divisor + 0.5).clamp(-LARGEST_CODE, LARGEST_CODE)
    # no step: all are zero, or too small for one; a step that is not finite: whatever its codes, it shows
    code = torch.where((divisor > 0) & torch.isfinite(divisor), code, 0.0)
    rows = torch.empty((*values.shape[:-1], width), dtype=CODE_DTYPE, device=values.device)
    rows[..., : values.shape[-1]] = code.flatten(-2).to(CODE_DTYPE)
    rows[..., values.shape[-1] :] = step.view(CODE_DTYPE)
    return rows


def decode(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values `[..., head_dim]` of rows `[..., coded_width(head_dim)]`."""
    head_dim = values_of(rows.shape[-1])
    require(rows.dtype == CODE_DTYPE, f"rows: dtype {rows.dtype}, expected {CODE_DTYPE}")
    code, step = rows[..., :head_dim].float(), rows[..., head_dim:].contiguous().view(STEP_DTYPE).float()
    return (code.unflatten(-1, (-1, STEP_VALUES)) * step[..., None]).flatten(-2).to(dtype)


def values_of(width: int) -> int:
    """Values of a row of `width` bytes. Raises `ValueError` for a width that no row has."""
    head_dim = width * STEP_VALUES // (STEP_VALUES + STEP_BYTES)
    require(
        head_dim > 0 and head_dim % STEP_VALUES == 0 and coded_width(head_dim) == width,
        f"rows of {width} bytes: expected {STEP_VALUES + STEP_BYTES} for every {STEP_VALUES} values",
    )
    return head_dim
