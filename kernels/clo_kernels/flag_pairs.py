"""Two flags in one number, whose sums over a block stay apart: one reduction or scan of a kernel serves both.

For blocks of less than 65,536.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def paired(first, second):
    """Flags to pairs, to be summed or scanned."""
    return first.to(tl.uint32) + (second.to(tl.uint32) << 16)


@triton.jit
def first_of(pairs):
    """Sums of the first flags."""
    return (pairs & 0xFFFF).to(tl.int32)


@triton.jit
def second_of(pairs):
    """Sums of the second flags."""
    return (pairs >> 16).to(tl.int32)
