"""Parts of kernels that write and read rows of coded pages; `coded_pages` says what they hold."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_block(values, DIM_PAD: tl.constexpr):
    """Codes [rows, DIM_PAD], int8, and steps [rows, DIM_PAD / 16], bfloat16, of float32 values, zero beyond a row."""
    rows: tl.constexpr = values.shape[0]
    groups = tl.reshape(values, [rows, DIM_PAD // 16, 16])
    exact = tl.div_rn(tl.max(tl.abs(groups), 2), tl.full([rows, DIM_PAD // 16], 127.0, tl.float32))
    # to the nearest of bfloat16, ties to even, by its bits: the interpreter's conversion cuts off
    bits = exact.to(tl.int32, bitcast=True)
    step = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
    # a maximum leaves out what is no number, a sum does not
    spoilt = tl.sum((groups != groups).to(tl.int32), 2) > 0
    step = tl.where(step < 1.1754943508222875e-38, 0.0, step)  # SMALLEST_STEP
    step = tl.where(spoilt, float("nan"), step)
    some = (step > 0) & (step < float("inf"))
    divisor = tl.broadcast_to(tl.where(some, step, 1.0)[:, :, None], groups.shape)
    # rounded as on a CPU: a plain division is approximate
    code = tl.floor(tl.div_rn(groups, divisor) + 0.5)
    code = tl.minimum(tl.maximum(code, -127.0), 127.0)
    code = tl.where(tl.broadcast_to(some[:, :, None], groups.shape), code, 0.0)
    return tl.reshape(code.to(tl.int8), [rows, DIM_PAD]), step.to(tl.bfloat16)


@triton.jit
def store_coded(codes, steps, row, values, valid, DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """Rows `row` of coded memory, seen as int8 (`codes`) and as bfloat16 (`steps`), from float32 values."""
    code, step = encode_block(values, DIM_PAD)
    dim = tl.arange(0, DIM_PAD)
    group = tl.arange(0, DIM_PAD // 16)
    WIDTH: tl.constexpr = DIM + DIM // 8
    tl.store(codes + row[:, None] * WIDTH + dim[None, :], code, mask=valid[:, None] & (dim < DIM)[None, :])
    at = row[:, None] * (WIDTH // 2) + DIM // 2 + group[None, :]
    tl.store(steps + at, step, mask=valid[:, None] & (group < DIM // 16)[None, :])


@triton.jit
def load_coded(
    codes,
    steps,
    row,
    valid,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    PAD: tl.constexpr,
    KIND: tl.constexpr,
):
    """Values [rows, PAD] of dtype KIND of rows `row` of coded memory: COUNT of a row's DIM from FIRST on, both
    multiples of 16; zero where not `valid` and beyond those."""
    dim = tl.arange(0, PAD)
    group = tl.arange(0, PAD // 16)
    WIDTH: tl.constexpr = DIM + DIM // 8
    at = row[:, None] * WIDTH + FIRST + dim[None, :]
    code = tl.load(codes + at, mask=valid[:, None] & (dim < COUNT)[None, :], other=0)
    at = row[:, None] * (WIDTH // 2) + (DIM // 2 + FIRST // 16) + group[None, :]
    step = tl.load(steps + at, mask=valid[:, None] & (group < COUNT // 16)[None, :], other=0.0)
    # codes and steps are exact in bfloat16, which multiplies two at once; float16 has too few exponents for steps
    PRODUCT: tl.constexpr = KIND if KIND == tl.bfloat16 else tl.float32  # noqa: SIM300
    groups = tl.reshape(code.to(PRODUCT), [code.shape[0], PAD // 16, 16])
    values = tl.reshape(groups * step.to(PRODUCT)[:, :, None], [code.shape[0], PAD])
    return values.to(KIND)
