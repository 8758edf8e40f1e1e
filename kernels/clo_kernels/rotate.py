"""Rotary positions into the new token's queries and keys, bit for bit as `transformers` does it, in one launch.

Does not know which frequencies a model has, nor what the vectors are for. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, LARGEST_VECTOR_DIM, check_tensor, require
from clo_kernels.dispatch import ROUNDED, on_device, runs_kernel

WARP_VALUES = 256


@triton.jit
def _turn(
    source,
    target,
    cosines,
    sines,
    FIRST: tl.constexpr,
    ROTATED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """One vector."""
    kind: tl.constexpr = source.dtype.element_ty
    HALF: tl.constexpr = ROTATED // 2
    dim = tl.arange(0, DIM_PAD)
    inside = dim < DIM
    at = dim - FIRST
    turns = (at >= 0) & (at < ROTATED)
    in_first = at < HALF
    if PAIRED:
        own_at = tl.where(in_first, 2 * at, 2 * (at - HALF) + 1)
        other_at = tl.where(in_first, 2 * at + 1, 2 * (at - HALF))
    else:
        own_at = at
        other_at = tl.where(in_first, at + HALF, at - HALF)
    own = tl.load(source + tl.where(turns, FIRST + own_at, dim), mask=inside, other=0.0)
    other = tl.load(source + FIRST + other_at, mask=turns, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + at, mask=turns, other=0.0).to(tl.float32)
    sine = tl.load(sines + at, mask=turns, other=0.0).to(tl.float32)
    # rounded after each product, as torch's operations are
    straight = (own.to(tl.float32) * cosine).to(kind).to(tl.float32)
    across = (tl.where(in_first, -other, other) * sine).to(kind).to(tl.float32)
    tl.store(target + dim, tl.where(turns, (straight + across).to(kind), own), mask=inside)


@triton.jit
def rotate_kernel(
    query,
    key,
    cosines,
    sines,
    turned_query,
    turned_key,
    num_query_heads,
    num_kv_heads,
    FIRST: tl.constexpr,
    ROTATED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAIRED: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cosines += sequence * ROTATED
    sines += sequence * ROTATED
    if head < num_query_heads:
        at = (sequence * num_query_heads + head) * DIM
        _turn(query + at, turned_query + at, cosines, sines, FIRST, ROTATED, DIM, DIM_PAD, PAIRED)
    else:
        at = (sequence * num_kv_heads + head - num_query_heads) * DIM
        _turn(key + at, turned_key + at, cosines, sines, FIRST, ROTATED, DIM, DIM_PAD, PAIRED)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *,
    first: int = 0,
    paired: bool = False,
    out_query: torch.Tensor | None = None,
    out_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` [batch, num_query_heads, head_dim] and `key` [batch, num_kv_heads, head_dim], rotated: other tensors.

    `cosines` and `sines` are [batch, rotated] of the same dtype, both halves written out. So many values from `first`
    on are rotated, value i with value i + rotated / 2 (RoFormer, arXiv 2104.09864, eq. 34, as Llama orders values);
    `paired`: value 2 i with value 2 i + 1, and what comes of them goes to i and i + rotated / 2. The others stay. There
    may be no KV head.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    batch, num_query_heads, head_dim = query.shape
    check_tensor("key", key, (batch, -1, head_dim), query.dtype, query.device)
    check_tensor("cosines", cosines, (batch, -1), query.dtype, query.device)
    rotated = cosines.shape[1]
    check_tensor("sines", sines, (batch, rotated), query.dtype, query.device)
    require(0 < head_dim <= LARGEST_VECTOR_DIM, f"query: head_dim = {head_dim}, expected 1 to {LARGEST_VECTOR_DIM}")
    require(rotated > 0 and rotated % 2 == 0, f"cosines: {rotated} values, expected an even number of at least 2")
    require(
        0 <= first <= head_dim - rotated,
        f"first = {first}, expected 0 to head_dim - rotated = {head_dim} - {rotated}",
    )
    out_query = torch.empty_like(query) if out_query is None else out_query
    out_key = torch.empty_like(key) if out_key is None else out_key
    check_tensor("out_query", out_query, tuple(query.shape), query.dtype, query.device)
    check_tensor("out_key", out_key, tuple(key.shape), query.dtype, query.device)
    if not runs_kernel(query):
        given = {"first": first, "paired": paired, "out_query": out_query, "out_key": out_key}
        return reference.rotate(query, key, cosines, sines, **given)
    if batch and num_query_heads + key.shape[1]:
        padded = int(triton.next_power_of_2(head_dim))
        with on_device(query):
            rotate_kernel[(batch, num_query_heads + key.shape[1])](
                query,
                key,
                cosines,
                sines,
                out_query,
                out_key,
                num_query_heads,
                key.shape[1],
                FIRST=first,
                ROTATED=rotated,
                DIM=head_dim,
                DIM_PAD=padded,
                PAIRED=paired,
                num_warps=max(1, min(4, padded // WARP_VALUES)),
                **ROUNDED,
            )
    return out_query, out_key
