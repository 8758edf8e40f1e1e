"""`gather_pages` by bulk reads: the Tensor Memory Accelerator of Hopper and later reads the host, not threads by loads.

Loads of a Hopper are said to have too little under way to fill its link. Whether bulk reads fill it is not known, nor
whether they may read the host at all: the bench tries both, the engine does not use it. **Not yet run on a GPU.**
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from clo_kernels.checks import require
from clo_kernels.dispatch import FUSED, on_device
from clo_kernels.layout import Resolved

ROW_WORDS = 256
"""4-byte words in a row of what is read at once: the widest that a descriptor may have."""
MOST_ROWS = 16
STAGES = 4
"""Of a program's loop: three reads are under way, in 48 KiB of shared memory at most, while one is stored."""


@triton.jit
def bulk_gather_kernel(
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
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    UNDER_WAY: tl.constexpr,
):
    READS: tl.constexpr = PAGE_WORDS // (ROWS * WORDS)
    row_index = tl.arange(0, ROWS_PAD)
    counts = tl.load(num_fetched + row_index, mask=row_index < num_rows, other=0)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    word = tl.arange(0, ROWS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    for first in tl.range(0, total * READS - tl.program_id(0), tl.num_programs(0), num_stages=UNDER_WAY):
        item = first + tl.program_id(0)
        fetch = item // READS
        before = ends <= fetch
        row = tl.sum(before.to(tl.int32), 0)
        entry = row * budget + fetch - tl.sum(tl.where(before, counts, 0), 0)
        page = tl.load(fetch_pages + entry)
        slot = tl.load(fetch_slots + entry)
        source = ((row // num_kv_heads) * num_pages + page) * num_kv_heads + row % num_kv_heads
        target = row.to(tl.int64) * num_slots + slot
        words = host_pages.load([(source * READS + item % READS) * ROWS, 0])
        tl.store(slots + target * PAGE_WORDS + (item % READS) * ROWS * WORDS + word, words)


def bulk_gather(host_pages: torch.Tensor, slots: torch.Tensor, fetch: Resolved, *, num_programs: int) -> torch.Tensor:
    """As `gather_pages`, on devices of compute capability 9.0 and later, for pages of 1, 2, 4, 8 or n times 16 KiB.

    Shapes are checked by `gather_pages` only.
    """
    page_words = host_pages[0, 0, 0].nbytes // 4
    rows = min(MOST_ROWS, page_words // ROW_WORDS)
    whole = rows > 0 and rows & (rows - 1) == 0 and page_words % (rows * ROW_WORDS) == 0
    require(whole, f"a page is {4 * page_words} bytes, expected 1, 2, 4, 8 or n times 16 KiB")
    words = host_pages.flatten().view(torch.int32).view(-1, ROW_WORDS)
    batch, heads, num_slots = slots.shape[:3]
    with on_device(slots):
        bulk_gather_kernel[(num_programs,)](
            TensorDescriptor.from_tensor(words, [rows, ROW_WORDS]),
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
            ROWS=rows,
            WORDS=ROW_WORDS,
            ROWS_PAD=triton.next_power_of_2(batch * heads),
            UNDER_WAY=STAGES,
            num_warps=8,
            **FUSED,
        )
    return slots
