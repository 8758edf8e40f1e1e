"""Parts of kernels that write and read the index of single tokens; `page_index` says what the bits mean."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_4bit(keys, inside, DIM_PAD: tl.constexpr):
    """Words [tokens, DIM_PAD / 8], and those of step and lowest value [tokens], of float32 keys [tokens, DIM_PAD]."""
    low16 = tl.min(tl.where(inside, keys, float("inf")), 1).to(tl.float16)
    low = low16.to(tl.float32)
    high = tl.max(tl.where(inside, keys, float("-inf")), 1)
    # rounded as on a CPU: a plain division is approximate
    step16 = tl.div_rn(high - low, tl.full([keys.shape[0]], 15.0, tl.float32)).to(tl.float16)
    step = step16.to(tl.float32)
    some = step > 0
    divisor = tl.broadcast_to(tl.where(some, step, 1.0)[:, None], keys.shape)
    code = tl.floor(tl.div_rn(keys - low[:, None], divisor) + 0.5)
    code = tl.minimum(tl.maximum(code, 0.0), 15.0)
    code = tl.where(inside & some[:, None], code, 0.0).to(tl.int32)
    eight = tl.reshape(code, [code.shape[0], DIM_PAD // 8, 8])
    words = tl.sum(eight << (4 * tl.arange(0, 8))[None, None, :], 2)
    scales = (low16.to(tl.int16, bitcast=True).to(tl.int32) << 16) | (
        step16.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    )
    return words, scales


@triton.jit
def unpack_4bit(words):
    """Codes [tokens, 8 * words] of words [tokens, words], as integers."""
    eight = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    return tl.reshape(eight, [words.shape[0], words.shape[1] * 8])


@triton.jit
def unpack_scales(scales):
    """Step and value of code 0, float32, of their words."""
    step = scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = (scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return step, low


@triton.jit
def sign_words(vectors, row, valid, planes, DIM: tl.constexpr, PART: tl.constexpr):
    """The sign hash [rows, 4] of rows `row` of vectors of DIM elements, at least 16 of them; of zero if not `valid`."""
    bit = tl.arange(0, 128)
    product = tl.zeros([row.shape[0], 128], tl.float32)
    for first in range(0, DIM, PART):
        dim = first + tl.arange(0, PART)
        inside = valid[:, None] & (dim < DIM)[None, :]
        part = tl.load(vectors + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        normals = tl.load(planes + bit[:, None] * DIM + dim[None, :], mask=(dim < DIM)[None, :], other=0.0)
        product += tl.dot(part, tl.trans(normals), input_precision="ieee")
    side = tl.reshape((product > 0).to(tl.int32), [row.shape[0], 4, 32])
    return tl.sum(side << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def bits_set(words):
    """How many bits of each word are set."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x & 0x3F).to(tl.int32)
