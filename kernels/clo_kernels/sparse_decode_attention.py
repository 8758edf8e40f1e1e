"""Decode attention of one new token per sequence over sinks, selected slots and window; pinned heads over all tokens.

Split-KV: programs attend to a share of the tokens each, a second launch merges them by their log-sum-exp. Does not know
which pages the slots hold, and applies no rotary embedding. Not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, check_tensor, group_size, require
from clo_kernels.dispatch import INTERPRETED, on_device, runs_kernel
from clo_kernels.layout import INT32, DeviceKV

BLOCK_BYTES = 64 * 256
"""Keys of a block of tokens. With values, and two blocks under way, about 70 KiB of shared memory."""
MAX_SPLITS = 64
TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _attend(query, keys, values, row, valid, dim, scale, peak, total, acc, DIM: tl.constexpr, DOT: tl.constexpr):
    """One block of tokens, whose vectors start `row` elements into `keys` and `values`; scores are in powers of two."""
    at = row[:, None] + dim[None, :]
    inside = valid[:, None] & (dim < DIM)[None, :]
    key = tl.load(keys + at, mask=inside, other=0.0).to(DOT)
    value = tl.load(values + at, mask=inside, other=0.0).to(DOT)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    score = tl.where(valid[None, :], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing valid yet: all weights are 0
    weight = tl.exp2(score - finite[:, None])
    shrink = tl.exp2(peak - finite)
    acc = acc * shrink[:, None] + tl.dot(weight.to(DOT), value, input_precision="ieee")
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def attend_split_kernel(
    query,
    sinks,
    window,
    slots,
    pinned,
    pinned_row,
    selected,
    lengths,
    partial,
    partial_lse,
    scale,
    num_kv_heads,
    num_sinks,
    ring_tokens,
    num_slots,
    num_selected,
    num_pinned,
    max_tokens,
    recent_tokens,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # sequence * num_kv_heads + KV head
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    sequence = row // num_kv_heads
    length = tl.load(lengths + sequence)
    start = tl.maximum(length - recent_tokens, 0) // PAGE * PAGE
    pin = tl.load(pinned_row + row % num_kv_heads)
    dim = tl.arange(0, DIM_PAD)
    lane = tl.arange(0, BLOCK)
    member = tl.arange(0, GROUP_PAD)
    head = row * GROUP + member
    given = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    q = tl.load(query + head[:, None] * DIM + dim[None, :], mask=given, other=0.0).to(DOT)
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)

    if pin >= 0:
        base = (sequence * num_pinned + pin) * 2 * max_tokens * DIM
        values = pinned + tl.cast(max_tokens, tl.int64) * DIM
        for first in range(split * BLOCK, length, num_splits * BLOCK):
            token = first + lane
            at = base + token.to(tl.int64) * DIM
            peak, total, acc = _attend(q, pinned, values, at, token < length, dim, scale, peak, total, acc, DIM, DOT)
    else:
        base = row * 2 * num_sinks * DIM
        last_sink = tl.minimum(num_sinks, start)
        for first in range(split * BLOCK, last_sink, num_splits * BLOCK):
            token = first + lane
            at = base + token.to(tl.int64) * DIM
            values = sinks + num_sinks * DIM
            peak, total, acc = _attend(q, sinks, values, at, token < last_sink, dim, scale, peak, total, acc, DIM, DOT)
        for first in range(split * BLOCK, num_selected * PAGE, num_splits * BLOCK):
            token = first + lane
            entry = token // PAGE
            slot = tl.load(selected + row * num_selected + entry, mask=entry < num_selected, other=-1)
            at = ((row * num_slots + slot) * 2 * PAGE + token % PAGE) * DIM
            values = slots + PAGE * DIM
            peak, total, acc = _attend(q, slots, values, at, slot >= 0, dim, scale, peak, total, acc, DIM, DOT)
        base = row * 2 * ring_tokens * DIM
        for first in range(start + split * BLOCK, length, num_splits * BLOCK):
            token = first + lane
            at = base + (token % ring_tokens).to(tl.int64) * DIM
            values = window + ring_tokens * DIM
            peak, total, acc = _attend(q, window, values, at, token < length, dim, scale, peak, total, acc, DIM, DOT)

    some = total > 0
    scaled = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    place = head * num_splits + split
    tl.store(partial + place[:, None] * DIM + dim[None, :], scaled, mask=given)
    tl.store(partial_lse + place, lse, mask=member < GROUP)


@triton.jit
def merge_splits_kernel(
    partial, partial_lse, out, num_splits, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)  # sequence * num_query_heads + query head
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.arange(0, DIM_PAD)
    inside = split < num_splits
    lse = tl.load(partial_lse + head * num_splits + split, mask=inside, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(peak == float("-inf"), 0.0, peak))
    at = (head * num_splits + split)[:, None] * DIM + dim[None, :]
    share = tl.load(partial + at, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0) * weight[:, None]
    total = tl.sum(weight, 0)
    merged = tl.sum(share, 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)


def sparse_decode_attention(
    query: torch.Tensor,
    kv: DeviceKV,
    selected: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output [batch, num_query_heads, head_dim] of `query`, of the same shape and dtype.

    `selected` is int32 [batch, num_kv_heads, budget]: slots of full pages, no slot twice, NO_SLOT anywhere; not read
    for pinned heads. `lengths` is int32 [batch], the new token included; a sequence of length 0 gives zeros. `scale` is
    1 / sqrt(head_dim) by default.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    kv.check(query.device, query.dtype)
    batch, heads, num_slots, _, page_size, head_dim = kv.slots.shape
    check_tensor("query", query, (batch, -1, head_dim), FLOATS)
    check_tensor("selected", selected, (batch, heads, -1), INT32, query.device)
    check_tensor("lengths", lengths, (batch,), INT32, query.device)
    num_query_heads = query.shape[1]
    group = group_size(num_query_heads, heads)
    out = torch.empty_like(query) if out is None else out
    check_tensor("out", out, tuple(query.shape), query.dtype, query.device)
    scale = head_dim**-0.5 if scale is None else scale
    if num_splits is None:
        num_splits = default_splits(query, kv, selected)
    require(0 < num_splits <= MAX_SPLITS, f"num_splits = {num_splits}, expected 1 to {MAX_SPLITS}")
    if not runs_kernel(query):
        return reference.sparse_decode_attention(query, kv, selected, lengths, scale=scale, out=out)
    if batch == 0:
        return out
    partial = torch.empty(batch * num_query_heads, num_splits, head_dim, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(batch * num_query_heads, num_splits, dtype=torch.float32, device=query.device)
    with on_device(query):
        attend_split_kernel[(batch * heads, num_splits)](
            query,
            kv.sinks,
            kv.window,
            kv.slots,
            kv.pinned,
            kv.pinned_row,
            selected,
            lengths,
            partial,
            partial_lse,
            scale * math.log2(math.e),
            heads,
            kv.sinks.shape[3],
            kv.ring_tokens,
            num_slots,
            selected.shape[2],
            kv.pinned.shape[1],
            kv.pinned.shape[3],
            kv.recent_tokens,
            GROUP=group,
            GROUP_PAD=max(16, triton.next_power_of_2(group)),
            DIM=head_dim,
            DIM_PAD=triton.next_power_of_2(head_dim),
            PAGE=page_size,
            BLOCK=block_tokens(query),
            # the interpreter cannot multiply bfloat16 matrices
            DOT=tl.float32 if INTERPRETED else TRITON_TYPES[query.dtype],
            num_warps=4,
            num_stages=2,
        )
        merge_splits_kernel[(batch * num_query_heads,)](
            partial,
            partial_lse,
            out,
            num_splits,
            DIM=head_dim,
            DIM_PAD=triton.next_power_of_2(head_dim),
            SPLITS_PAD=triton.next_power_of_2(num_splits),
            num_warps=2,
        )
    return out


def block_tokens(query: torch.Tensor) -> int:
    """Tokens of a block: 16 to 64, as many as fit."""
    padded = int(triton.next_power_of_2(query.shape[-1]))
    return max(16, min(64, BLOCK_BYTES // (padded * int(query.element_size()))))


def default_splits(query: torch.Tensor, kv: DeviceKV, selected: torch.Tensor) -> int:
    """Enough programs for two on every SM, but none without tokens."""
    rows = kv.slots.shape[0] * kv.slots.shape[1]
    tokens: int = max(selected.shape[2] * kv.page_size, kv.ring_tokens)
    if kv.pinned.shape[1]:
        tokens = max(tokens, kv.pinned.shape[3])
    processors: int = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    return int(max(1, min(-(-2 * processors // max(1, rows)), -(-tokens // block_tokens(query)), MAX_SPLITS)))
