"""Appends each sequence's new token: into the window ring, the sinks, or all tokens of a pinned head.

When that moves the window by a page, the page that leaves is stored to the host and its index entry is written. The CPU
sees it once the launch has finished. Does not know where keys come from; they are rotated. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, check_host_tensor, check_tensor, require
from clo_kernels.coded_pages import STEP_DTYPE
from clo_kernels.coded_rows import store_coded
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.index_codes import pack_4bit, sign_words
from clo_kernels.layout import INT32, DeviceKV
from clo_kernels.page_index import check_index

TOKEN_BLOCK = 32
BLOCK_VALUES = 8192
"""Of keys that a program holds at once; of 16 wide ones it holds more, by twice as many warps."""
HASHED_PART = 64


@triton.jit
def append_kv_kernel(
    key,
    value,
    lengths,
    sinks,
    window,
    pinned,
    pinned_row,
    host_pages,
    host_steps,
    index,
    planes,
    num_kv_heads,
    num_sinks,
    ring_tokens,
    num_pinned,
    max_tokens,
    recent_tokens,
    num_pages,
    page_step,
    head_step,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    KIND: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK: tl.constexpr,
    HASHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # sequence * num_kv_heads + KV head
    sequence = row // num_kv_heads
    head = row % num_kv_heads
    length = tl.load(lengths + sequence)
    token = length - 1
    dim = tl.arange(0, DIM_PAD)
    column = dim < DIM
    new_key = tl.load(key + row * DIM + dim, mask=column, other=0.0)
    if ROWS == 2:  # else keys are values, too
        new_value = tl.load(value + row * DIM + dim, mask=column, other=0.0)
    pin = tl.load(pinned_row + head)
    if pin >= 0:
        base = (sequence * num_pinned + pin) * ROWS * max_tokens
        if (token >= 0) & (token < max_tokens):
            tl.store(pinned + (base + token) * DIM + dim, new_key, mask=column)
            if ROWS == 2:
                tl.store(pinned + (base + max_tokens + token) * DIM + dim, new_value, mask=column)
    elif token >= 0:
        base = row * ROWS * ring_tokens
        before = tl.maximum(token - recent_tokens, 0) // PAGE
        after = tl.maximum(length - recent_tokens, 0) // PAGE
        if (after > before) & (before < num_pages):
            page = sequence * num_pages * num_kv_heads + tl.cast(before, tl.int64) * page_step + head * head_step
            low = tl.full([DIM_PAD], float("inf"), tl.float32)
            high = tl.full([DIM_PAD], float("-inf"), tl.float32)
            total = tl.zeros([DIM_PAD], tl.float32)
            first = before * PAGE % ring_tokens
            for start in range(0, PAGE, BLOCK):
                lane = start + tl.arange(0, BLOCK)
                inside = (lane < PAGE)[:, None] & column[None, :]
                at = (base + first + lane)[:, None] * DIM + dim[None, :]
                keys = tl.load(window + at, mask=inside, other=0.0)
                exact = keys.to(tl.float32)
                vector = page * ROWS * PAGE + lane
                to = vector[:, None] * DIM + dim[None, :]
                if CODED:
                    store_coded(host_pages, host_steps, vector, exact, lane < PAGE, DIM, DIM_PAD)
                else:
                    tl.store(host_pages + to, keys, mask=inside)
                if ROWS == 2:
                    values = tl.load(window + at + tl.cast(ring_tokens, tl.int64) * DIM, mask=inside, other=0.0)
                    if CODED:
                        given = values.to(tl.float32)
                        store_coded(host_pages, host_steps, vector + PAGE, given, lane < PAGE, DIM, DIM_PAD)
                    else:
                        tl.store(host_pages + to + PAGE * DIM, values, mask=inside)
                if KIND == "key_4bit":
                    words, scales = pack_4bit(exact, inside, DIM_PAD)
                    word = tl.arange(0, DIM_PAD // 8)
                    WORDS: tl.constexpr = DIM // 8 + 1
                    at = ((row * num_pages + before) * PAGE + lane) * WORDS
                    held = (lane < PAGE)[:, None] & (word < DIM // 8)[None, :]
                    tl.store(index + at[:, None] + word[None, :], words, mask=held)
                    tl.store(index + at + DIM // 8, scales, mask=lane < PAGE)
                elif KIND == "sign_hash":
                    at = ((row * num_pages + before) * PAGE + lane) * 4
                    words = sign_words(window, base + first + lane, lane < PAGE, planes, DIM, HASHED)
                    tl.store(index + at[:, None] + tl.arange(0, 4)[None, :], words, mask=(lane < PAGE)[:, None])
                elif KIND == "page_minmax":
                    low = tl.minimum(low, tl.min(tl.where(inside, exact, float("inf")), 0))
                    high = tl.maximum(high, tl.max(tl.where(inside, exact, float("-inf")), 0))
                elif KIND == "page_mean":
                    total += tl.sum(exact, 0)
            kind = index.dtype.element_ty
            if KIND == "page_minmax":
                entry = index + (row * num_pages + before) * 2 * DIM + dim
                tl.store(entry, low.to(kind), mask=column)
                tl.store(entry + DIM, high.to(kind), mask=column)
            elif KIND == "page_mean":
                entry = index + (row * num_pages + before) * DIM + dim
                tl.store(entry, (total / PAGE).to(kind), mask=column)
        # the ring is a page larger than the window: this row is none of those that leave
        to = base + token % ring_tokens
        tl.store(window + to * DIM + dim, new_key, mask=column)
        if ROWS == 2:
            tl.store(window + (to + ring_tokens) * DIM + dim, new_value, mask=column)
        if token < num_sinks:
            to = row * ROWS * num_sinks + token
            tl.store(sinks + to * DIM + dim, new_key, mask=column)
            if ROWS == 2:
                tl.store(sinks + (to + num_sinks) * DIM + dim, new_value, mask=column)


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor | None,
    lengths: torch.Tensor,
    kv: DeviceKV,
    host_pages: torch.Tensor,
    index: torch.Tensor | None,
    *,
    planes: torch.Tensor | None = None,
) -> None:
    """Store `key` and `value` [batch, num_kv_heads, head_dim] as token `lengths - 1` of each sequence.

    `lengths` is int32 [batch], the new token included; nothing happens where it is 0. `host_pages` [batch, num_pages,
    num_kv_heads, 2, page_size, head_dim] is pinned, or on the device: there also pages that lie head by head, as slots
    do, with their dimensions 1 and 2 exchanged; coded where the slots are. `index` [batch, num_kv_heads, num_pages,
    *entry] has one of the layouts in `page_index`, and `planes` are those of a sign hash; without it pages are not
    indexed. A pinned head's tokens go nowhere else. A page or token beyond the room for it is dropped: the caller makes
    sure that sequences fit. Where keys are values, too (`kv.value_dim`), `value` is none.
    """
    kv.check(key.device, key.dtype)
    (batch, heads), page_size, head_dim = kv.slots.shape[:2], kv.page_size, kv.head_dim
    check_tensor("key", key, (batch, heads, head_dim), FLOATS)
    require(
        (value is None) == (kv.value_dim is not None), "value: goes with keys that are no values, kv.value_dim none"
    )
    if value is not None:
        check_tensor("value", value, (batch, heads, head_dim), key.dtype, key.device)
    check_tensor("lengths", lengths, (batch,), INT32, key.device)
    by_head = not host_pages.is_contiguous() and host_pages.dim() == 6
    stored = host_pages.transpose(1, 2) if by_head else host_pages
    places = (heads, -1) if by_head else (-1, heads)
    check_tensor("host_pages", stored, (batch, *places, kv.rows_per_token, page_size, kv.row_width), kv.slots.dtype)
    check_host_tensor("host_pages", host_pages, key.device)
    num_pages = host_pages.shape[1]
    kind = None if index is None else check_index(index, (batch, heads), head_dim, planes, key.device)
    if index is not None and kind is not None:
        expected = (batch, heads, num_pages, page_size if kind.of_tokens else -1, -1)
        check_tensor("index", index, expected, INT32 if kind.of_tokens else key.dtype)
    if not runs_kernel(key):
        reference.append_kv(key, value, lengths, kv, host_pages, index, planes=planes)
    elif batch:
        padded = int(triton.next_power_of_2(head_dim))
        most = max(1, min(TOKEN_BLOCK, BLOCK_VALUES // padded))
        # a matrix product takes 16 rows
        block = max(16 if planes is not None else 1, min(most, int(triton.next_power_of_2(page_size))))
        with on_device(key):
            append_kv_kernel[(batch * heads,)](
                key,
                key if value is None else value,
                lengths,
                kv.sinks,
                kv.window,
                kv.pinned,
                kv.pinned_row,
                host_pages,
                host_pages.view(STEP_DTYPE) if kv.coded else host_pages,
                # of pages that are not indexed nothing is read or written here
                host_pages if index is None else index,
                lengths if planes is None else planes,
                heads,
                kv.sinks.shape[3],
                kv.ring_tokens,
                kv.pinned.shape[1],
                kv.pinned.shape[3],
                kv.recent_tokens,
                num_pages,
                1 if by_head else heads,
                num_pages if by_head else 1,
                DIM=head_dim,
                DIM_PAD=padded,
                ROWS=kv.rows_per_token,
                PAGE=page_size,
                KIND=str(kind),
                CODED=kv.coded,
                BLOCK=block,
                HASHED=min(HASHED_PART, padded),
                num_warps=4 if block * padded <= BLOCK_VALUES else 8,
                **FUSED,
            )
