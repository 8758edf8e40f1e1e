"""Decode attention of one new token per sequence over sinks, selected slots and window; pinned heads over all tokens.

Split-KV: programs attend to a share of the tokens each, a second launch merges them by their log-sum-exp. Slots, window
and sinks are one list of blocks that programs take in turn: none gets two more than another, and one pipeline of copies
serves all. Vectors that are key and value in one are read once; of query heads that share them, programs take some
each. Does not know which pages the slots hold, and applies no rotary embedding. Not yet run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, check_tensor, group_size, require
from clo_kernels.coded_pages import STEP_DTYPE
from clo_kernels.coded_rows import load_coded
from clo_kernels.dispatch import FUSED, INTERPRETED, on_device, runs_kernel
from clo_kernels.layout import INT32, DeviceKV

BLOCK_BYTES = 64 * 256
"""Keys of a block of tokens."""
PROGRAM_BYTES = 74 * 1024
"""Shared memory of a program: keys and values of two blocks under way, and what it needs besides."""
MAX_RESIDENT = 3
"""Programs that the registers of a multiprocessor hold."""
MOST_SHARING = 32
"""Query heads of a program where vectors are key and value in one: all heads of a layer share those."""
SHARED_PROGRAM_BYTES = 120 * 1024
"""The same of such a program, at least; a multiprocessor has registers for one."""
BESIDE_BYTES = 2048
"""Of it what is neither vectors nor queries."""
DECODED_BYTES = {(3, 2): 2, (2, 2): 4, (3, 4): 2, (2, 4): 2}
"""Of it what a value read from codes takes on its way to a product, at most of all widths compiled: by stages and
bytes of a value."""
MERGED_PART = 128
MAX_SPLITS = 64
LOG2_E = math.log2(math.e)
TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _attend(score, value, valid, scale, peak, total, acc, DOT: tl.constexpr):
    """One block of tokens, of which those that are not `valid` have no share; scores are in powers of two."""
    score = tl.where(valid[None, :], score * scale, float("-inf"))
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
    slot_steps,
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
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    REST: tl.constexpr,
    REST_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    CODED: tl.constexpr,
    DOT: tl.constexpr,
):
    """REST: dimensions of a key behind the DIM that are its value; -1 where values have vectors of their own."""
    PARTS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    ROWS: tl.constexpr = 2 if REST < 0 else 1
    WIDTH: tl.constexpr = DIM + REST if REST > 0 else DIM
    row = (tl.program_id(0) // PARTS).to(tl.int64)  # sequence * num_kv_heads + KV head
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    sequence = row // num_kv_heads
    length = tl.load(lengths + sequence)
    start = tl.maximum(length - recent_tokens, 0) // PAGE * PAGE
    pin = tl.load(pinned_row + row % num_kv_heads)
    dim = tl.arange(0, DIM_PAD)
    lane = tl.arange(0, BLOCK)
    member = tl.program_id(0) % PARTS * MEMBERS + tl.arange(0, MEMBERS)
    head = row * GROUP + member
    given = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    q = tl.load(query + head[:, None] * WIDTH + dim[None, :], mask=given, other=0.0).to(DOT)
    if REST > 0:
        rest = tl.arange(0, REST_PAD)
        of_rest = (member < GROUP)[:, None] & (rest < REST)[None, :]
        q_rest = tl.load(query + head[:, None] * WIDTH + DIM + rest[None, :], mask=of_rest, other=0.0).to(DOT)
    peak = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    acc = tl.zeros([MEMBERS, DIM_PAD], tl.float32)

    # blocks of slots, then of the ring, then of sinks; all tokens of a pinned head are a ring that never wraps
    is_pinned = pin >= 0
    ring = tl.where(is_pinned, pinned, window)
    ring_row = tl.where(is_pinned, sequence * num_pinned + pin, row)
    ring_length = tl.where(is_pinned, max_tokens, ring_tokens)
    ring_first = tl.where(is_pinned, 0, start % ring_tokens)
    in_ring = tl.where(is_pinned, length, length - start)
    in_sinks = tl.where(is_pinned, 0, tl.minimum(num_sinks, start))
    num_listed = tl.where(is_pinned, 0, num_selected)
    ring_block = tl.cdiv(num_listed * PAGE, BLOCK)
    sinks_block = ring_block + tl.cdiv(in_ring, BLOCK)
    last_block = sinks_block + tl.cdiv(in_sinks, BLOCK)

    selected += row * num_selected
    entry = (split * BLOCK + lane) // PAGE
    # of pinned heads too, whose slots are of no use: whether a head is pinned is still on its way
    next_slot = tl.load(selected + entry, mask=entry < num_selected, other=-1)
    first_block = split
    plain = slots
    if CODED:
        for block in range(split, ring_block, num_splits):
            slot = next_slot.to(tl.int64)
            entry = ((block + num_splits) * BLOCK + lane) // PAGE
            next_slot = tl.load(selected + entry, mask=entry < num_selected, other=-1)
            valid = slot >= 0
            vector = (row * num_slots + tl.where(valid, slot, 0)) * ROWS * PAGE + (block * BLOCK + lane) % PAGE
            key = load_coded(slots, slot_steps, vector, valid, WIDTH, 0, DIM, DIM_PAD, DOT)
            score = tl.dot(q, tl.trans(key), input_precision="ieee")
            value = key
            if REST < 0:
                value = load_coded(slots, slot_steps, vector + PAGE, valid, WIDTH, 0, DIM, DIM_PAD, DOT)
            if REST > 0:
                key_rest = load_coded(slots, slot_steps, vector, valid, WIDTH, DIM, REST, REST_PAD, DOT)
                score += tl.dot(q_rest, tl.trans(key_rest), input_precision="ieee")
            peak, total, acc = _attend(score, value, valid, scale, peak, total, acc, DOT)
        # what is left is not coded: this program's blocks behind those of slots
        first_block = split + tl.cdiv(tl.maximum(ring_block - split, 0), num_splits) * num_splits
        plain = window
    for block in range(first_block, last_block, num_splits):
        # slots are loaded a block ahead: keys and values of later blocks can then be under way
        slot = next_slot.to(tl.int64)
        entry = ((block + num_splits) * BLOCK + lane) // PAGE
        next_slot = tl.load(selected + entry, mask=entry < num_selected, other=-1)

        of_slots = block < ring_block
        of_sinks = block >= sinks_block
        token = (block - tl.where(of_sinks, sinks_block, tl.where(of_slots, 0, ring_block))) * BLOCK + lane
        turn = ring_first + token
        turn = tl.where(turn < ring_length, turn, turn - ring_length)
        base = tl.where(of_slots, plain, tl.where(of_sinks, sinks, ring))
        # vectors of keys before those of values, and rows of keys and values before this one
        vectors = tl.where(of_slots, PAGE, tl.where(of_sinks, num_sinks, ring_length)).to(tl.int64)
        before = tl.where(of_slots, row * num_slots, tl.where(of_sinks, row, ring_row))
        vector = tl.where(of_slots, token % PAGE, tl.where(of_sinks, token, turn))
        valid = tl.where(of_slots, slot >= 0, token < tl.where(of_sinks, in_sinks, in_ring))
        at = ((before + tl.where(of_slots, slot, 0)) * ROWS * vectors + vector) * WIDTH
        place = at[:, None] + dim[None, :]
        inside = valid[:, None] & (dim < DIM)[None, :]
        key = tl.load(base + place, mask=inside, other=0.0).to(DOT)
        score = tl.dot(q, tl.trans(key), input_precision="ieee")
        value = key
        if REST < 0:
            value = tl.load(base + vectors * DIM + place, mask=inside, other=0.0).to(DOT)
        if REST > 0:
            inside = valid[:, None] & (rest < REST)[None, :]
            key_rest = tl.load(base + DIM + at[:, None] + rest[None, :], mask=inside, other=0.0).to(DOT)
            score += tl.dot(q_rest, tl.trans(key_rest), input_precision="ieee")
        peak, total, acc = _attend(score, value, valid, scale, peak, total, acc, DOT)

    some = total > 0
    scaled = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    place = head * num_splits + split
    tl.store(partial + place[:, None] * DIM + dim[None, :], scaled, mask=given)
    tl.store(partial_lse + place, lse, mask=member < GROUP)


@triton.jit
def merge_splits_kernel(
    partial,
    partial_lse,
    sink_logits,
    out,
    num_splits,
    num_query_heads,
    WITH_SINKS: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """`sink_logits`, in powers of two, have a share of the sum and no value."""
    head = tl.program_id(0).to(tl.int64)  # sequence * num_query_heads + query head
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.program_id(1) * PART + tl.arange(0, PART)
    inside = split < num_splits
    lse = tl.load(partial_lse + head * num_splits + split, mask=inside, other=float("-inf"))
    at = (head * num_splits + split)[:, None] * DIM + dim[None, :]
    share = tl.load(partial + at, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
    peak = tl.max(lse, 0)
    if WITH_SINKS:
        sink = tl.load(sink_logits + head % num_query_heads)
        peak = tl.maximum(peak, sink)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - finite)
    total = tl.sum(weight, 0)
    if WITH_SINKS:
        total += tl.exp2(sink - finite)
    merged = tl.sum(share * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + head * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)


def sparse_decode_attention(
    query: torch.Tensor,
    kv: DeviceKV,
    selected: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    sink_logits: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output [batch, num_query_heads, value width of `kv`] of `query` [..., head_dim], of the same dtype.

    `selected` is int32 [batch, num_kv_heads, budget]: slots of full pages, no slot twice, NO_SLOT anywhere; of no use
    for pinned heads. `lengths` is int32 [batch], the new token included; a sequence of length 0 gives zeros. `scale` is
    1 / sqrt(head_dim) by default. `sink_logits`, one of each query head, take their share of the softmax, and have no
    value.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    kv.check(query.device, query.dtype)
    (batch, heads, num_slots), page_size, head_dim = kv.slots.shape[:3], kv.page_size, kv.head_dim
    check_tensor("query", query, (batch, -1, head_dim), FLOATS)
    check_tensor("selected", selected, (batch, heads, -1), INT32, query.device)
    check_tensor("lengths", lengths, (batch,), INT32, query.device)
    num_query_heads = query.shape[1]
    group = group_size(num_query_heads, heads)
    given = (batch, num_query_heads, kv.value_width)
    out = query.new_empty(given) if out is None else out
    check_tensor("out", out, given, query.dtype, query.device)
    scale = head_dim**-0.5 if scale is None else scale
    if num_splits is None:
        num_splits = default_splits(query, kv, selected)
    require(0 < num_splits <= MAX_SPLITS, f"num_splits = {num_splits}, expected 1 to {MAX_SPLITS}")
    if sink_logits is not None:
        check_tensor("sink_logits", sink_logits, (num_query_heads,), FLOATS, query.device)
    if not runs_kernel(query):
        return reference.sparse_decode_attention(
            query, kv, selected, lengths, scale=scale, sink_logits=sink_logits, out=out
        )
    if batch == 0:
        return out
    width, tiles = kv.value_width, Tiles.of(query, kv)
    partial = torch.empty(batch * num_query_heads, num_splits, width, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(batch * num_query_heads, num_splits, dtype=torch.float32, device=query.device)
    with on_device(query):
        attend_split_kernel[(batch * heads * tiles.parts, num_splits)](
            query,
            kv.sinks,
            kv.window,
            kv.slots,
            kv.slots.view(STEP_DTYPE) if kv.coded else kv.slots,
            kv.pinned,
            kv.pinned_row,
            selected,
            lengths,
            partial,
            partial_lse,
            scale * LOG2_E,
            heads,
            kv.sinks.shape[3],
            kv.ring_tokens,
            num_slots,
            selected.shape[2],
            kv.pinned.shape[1],
            kv.pinned.shape[3],
            kv.recent_tokens,
            GROUP=group,
            MEMBERS=tiles.members,
            DIM=width,
            DIM_PAD=_padded(width),
            REST=-1 if kv.value_dim is None else head_dim - width,
            REST_PAD=_padded(head_dim - width),
            PAGE=page_size,
            BLOCK=tiles.block,
            CODED=kv.coded,
            # the interpreter cannot multiply bfloat16 matrices
            DOT=tl.float32 if INTERPRETED else TRITON_TYPES[query.dtype],
            num_warps=tiles.num_warps,
            **FUSED,
            num_stages=tiles.num_stages,
        )
        part = min(MERGED_PART, int(triton.next_power_of_2(width)))
        merge_splits_kernel[(batch * num_query_heads, triton.cdiv(width, part))](
            partial,
            partial_lse,
            partial_lse if sink_logits is None else sink_logits.float() * LOG2_E,
            out,
            num_splits,
            num_query_heads,
            WITH_SINKS=sink_logits is not None,
            DIM=width,
            PART=part,
            SPLITS_PAD=triton.next_power_of_2(num_splits),
            num_warps=4,
            **FUSED,
        )
    return out


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program holds: query heads of a group, tokens of a block, and blocks under way beside the one in use."""

    members: int
    parts: int
    """Programs that share a group's query heads."""
    block: int
    num_warps: int
    num_stages: int
    program_bytes: int
    """Shared memory that a program leaves no other, about."""

    @classmethod
    def of(cls, query: torch.Tensor, kv: DeviceKV) -> Tiles:
        """For the group and the vectors that there are."""
        group = query.shape[1] // kv.window.shape[1]
        members = max(16, int(triton.next_power_of_2(group)))
        if kv.value_dim is None:
            return cls(members, 1, block_tokens(query), 4, 3, PROGRAM_BYTES)
        # what more heads would need beside codes, or products of float32, takes more registers than there are
        exact = query.dtype == torch.float32
        members = min(members, 16 if kv.coded or exact else MOST_SHARING)
        block, most = 16 if exact else 32, shared_memory(query.device, of_program=True)
        # two blocks under way beside the one in use if they fit, or one, of fewer tokens and heads if need be
        tried = ((3, block, members), (2, block, members), (2, 16, members), (2, 16, 16))
        sizes = {one: _vector_bytes(query, kv, *one) for one in tried}
        chosen = next((one for one, size in sizes.items() if not most or size <= most), None)
        if chosen is None:
            raise ValueError(
                f"query: head_dim = {kv.head_dim}, {kv.value_width} of it the value, in {query.dtype} needs "
                f"{min(sizes.values())} bytes of shared memory in a program, this device has {most}"
            )
        stages, block, members = chosen
        return cls(members, -(-group // members), block, 8, stages, max(SHARED_PROGRAM_BYTES, sizes[chosen]))


def _vector_bytes(query: torch.Tensor, kv: DeviceKV, stages: int, block: int, members: int) -> int:
    """Shared memory of a program over vectors that are key and value in one: at least what Triton takes.

    A little more, or of codes up to 1.4 times as much: some widths take what `DECODED_BYTES` says, others nothing.
    """
    width = _padded(kv.value_width) + _padded(kv.head_dim - kv.value_width)
    item = int(query.element_size())
    decoded = DECODED_BYTES[stages, item] * block if kv.coded else 0
    return width * (item * ((stages - 1) * block + members) + decoded) + BESIDE_BYTES


def _padded(width: int) -> int:
    """As wide as a matrix product takes it."""
    return max(16, int(triton.next_power_of_2(width)))


def block_tokens(query: torch.Tensor) -> int:
    """Tokens of a block: 16 to 64, as many as fit."""
    padded = int(triton.next_power_of_2(query.shape[-1]))
    # tensor cores multiply no float32 exactly: its products take registers, half a block is what they hold
    block_bytes = BLOCK_BYTES // 2 if query.dtype == torch.float32 else BLOCK_BYTES
    return max(16, min(64, block_bytes // (padded * int(query.element_size()))))


def default_splits(query: torch.Tensor, kv: DeviceKV, selected: torch.Tensor) -> int:
    """As many programs as run at once, but none without tokens."""
    tiles = Tiles.of(query, kv)
    parts = (selected.shape[2] * kv.page_size, kv.ring_tokens, kv.sinks.shape[3])
    blocks = sum(-(-tokens // tiles.block) for tokens in parts)
    if kv.pinned.shape[1]:
        blocks = max(blocks, -(-kv.pinned.shape[3] // tiles.block))
    rows = kv.slots.shape[0] * kv.slots.shape[1] * tiles.parts
    at_once = resident_programs(query.device, tiles.program_bytes)
    return int(max(1, min(at_once // max(1, rows), blocks, MAX_SPLITS)))


def resident_programs(device: torch.device, program_bytes: int = PROGRAM_BYTES) -> int:
    """Programs that all multiprocessors hold at once: one more would run alone, after the others."""
    if device.type != "cuda":
        return 2
    held = shared_memory(device, of_program=False) // program_bytes
    return int(torch.cuda.get_device_properties(device).multi_processor_count * max(1, min(MAX_RESIDENT, held)))


def shared_memory(device: torch.device, *, of_program: bool) -> int:
    """Bytes of a multiprocessor, or as many of them as one program may take; 0 where there is no limit."""
    if device.type != "cuda":
        return 0
    name = "shared_memory_per_block_optin" if of_program else "shared_memory_per_multiprocessor"
    return int(getattr(torch.cuda.get_device_properties(device), name, 2 * PROGRAM_BYTES))
