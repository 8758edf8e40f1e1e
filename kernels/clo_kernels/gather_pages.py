"""Copies pages from pinned host memory into their slots: the GPU reads the host itself, without a copy engine.

A chosen number of programs strides over the chunks of all pages to fetch, so that the rest of the GPU stays free. Moves
bit patterns; does not know what they mean. Not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import check_host_tensor, check_tensor, require
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.layout import Resolved

FLOATS_AND_BYTES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32)
CHUNK_WORDS = 4096
"""4-byte words of a page that a program moves at once, at most."""
IN_FLIGHT_WORDS = 8192
"""4-byte words that a program asks for before it stores the first: eight 16-byte loads in each of 256 threads.

A link of 55 GB/s with 2 us of latency has 110 KB under way: four programs.
"""
MAX_ROWS = 16384


@triton.jit
def gather_pages_kernel(
    host_pages,
    slots,
    fetch_pages,
    fetch_slots,
    num_fetched,
    num_rows,
    budget,
    num_kv_heads,
    num_pages,
    num_slots,
    PAGE_WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    ITEMS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
):
    CHUNKS: tl.constexpr = (PAGE_WORDS + CHUNK - 1) // CHUNK
    row_index = tl.arange(0, ROWS_PAD)
    counts = tl.load(num_fetched + row_index, mask=row_index < num_rows, other=0)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    word = tl.arange(0, CHUNK)[None, :]
    several = tl.program_id(0) + tl.arange(0, ITEMS) * tl.num_programs(0)
    for first in range(0, total * CHUNKS - tl.program_id(0), tl.num_programs(0) * ITEMS):
        item = first + several
        live = item < total * CHUNKS
        fetch = item // CHUNKS
        before = ends[None, :] <= fetch[:, None]
        row = tl.sum(before.to(tl.int32), 1)
        entry = row * budget + fetch - tl.sum(tl.where(before, counts[None, :], 0), 1)
        page = tl.load(fetch_pages + entry, mask=live, other=0).to(tl.int64)
        slot = tl.load(fetch_slots + entry, mask=live, other=0).to(tl.int64)
        source = ((row // num_kv_heads).to(tl.int64) * num_pages + page) * num_kv_heads + row % num_kv_heads
        target = row.to(tl.int64) * num_slots + slot
        offset = ((item % CHUNKS) * CHUNK)[:, None]
        inside = live[:, None] & (offset + word < PAGE_WORDS)
        words = tl.load(host_pages + (source * PAGE_WORDS)[:, None] + offset + word, mask=inside)
        tl.store(slots + (target * PAGE_WORDS)[:, None] + offset + word, words, mask=inside)


def gather_pages(
    host_pages: torch.Tensor, slots: torch.Tensor, fetch: Resolved, *, num_programs: int = 16
) -> torch.Tensor:
    """Copy the pages that `fetch` lists from `host_pages` into `slots`; returns `slots`.

    `host_pages` [batch, num_pages, num_kv_heads, 2, page_size, head_dim] is pinned (or on the device), `slots` is
    [batch, num_kv_heads, num_slots, 2, page_size, head_dim], or both have one row a token. Pages and slots in the list
    are not checked.
    """
    check_tensor("slots", slots, (-1, -1, -1, -1, -1, -1), FLOATS_AND_BYTES)
    batch, heads, num_slots, *page = slots.shape
    check_tensor("host_pages", host_pages, (batch, -1, heads, *page), slots.dtype)
    check_host_tensor("host_pages", host_pages, slots.device)
    fetch.check((batch, heads), slots.device)
    page_bytes = math.prod(page) * slots.element_size()
    require(page_bytes % 4 == 0 and page_bytes > 0, f"a page is {page_bytes} bytes, expected a multiple of 4")
    for name, tensor in (("host_pages", host_pages), ("slots", slots)):
        require(tensor.data_ptr() % 16 == 0, f"{name}: starts at {tensor.data_ptr():#x}, expected a multiple of 16")
    require(batch * heads <= MAX_ROWS, f"batch * num_kv_heads = {batch * heads}, expected at most {MAX_ROWS}")
    require(num_programs > 0, f"num_programs = {num_programs} must be positive")
    if not runs_kernel(slots):
        return reference.gather_pages(host_pages, slots, fetch, num_programs=num_programs)
    if batch * heads:
        page_words = page_bytes // 4
        chunk = min(CHUNK_WORDS, triton.next_power_of_2(page_words))
        with on_device(slots):
            gather_pages_kernel[(num_programs,)](
                # rows of coded pages need not be whole words, pages are
                host_pages.flatten().view(torch.int32),
                slots.flatten().view(torch.int32),
                fetch.fetch_pages,
                fetch.fetch_slots,
                fetch.num_fetched,
                batch * heads,
                fetch.slots.shape[2],
                heads,
                host_pages.shape[1],
                num_slots,
                PAGE_WORDS=page_words,
                CHUNK=chunk,
                ITEMS=max(1, IN_FLIGHT_WORDS // chunk),
                ROWS_PAD=triton.next_power_of_2(batch * heads),
                num_warps=8,
                **FUSED,
            )
    return slots
