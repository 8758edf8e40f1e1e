"""Logits of pages from an index of single tokens, 4-bit keys or sign hashes: what `score_pages` launches first.

A page's logit is the log-sum-exp of its tokens' estimated logits, so that a softmax over pages is the attention that
falls on each. Not yet run on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from clo_kernels.dispatch import FUSED, INTERPRETED
from clo_kernels.index_codes import bits_set, sign_words, unpack_4bit, unpack_scales
from clo_kernels.page_index import HASH_WORDS

TOKEN_BLOCK = 64
MOST_MEMBERS, MOST_HASHED = 32, 16
"""Query heads that a program scores for, at most."""
WHOLE, PART, EXACT_PART = 128, 64, 32
"""Dimensions that are multiplied at once: all of these many, so many of more, and of float32, which registers hold."""
HASHED_AT_ONCE = 16
HASHED_PART = 64
TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def hash_query_kernel(
    query, planes, codes, lengths, num_vectors, DIM: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # of queries: sequences and query heads
    valid = row < num_vectors
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, DIM, PART):
        dim = first + tl.arange(0, PART)
        inside = valid[:, None] & (dim < DIM)[None, :]
        q = tl.load(query + row[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(q * q, 1)
    tl.store(lengths + row, tl.sqrt(squares), mask=valid)
    words = sign_words(query, row, valid, planes, DIM, PART)
    tl.store(codes + row[:, None] * 4 + tl.arange(0, 4)[None, :], words, mask=valid[:, None])


@triton.jit
def store_logits(page_logit, page, head, in_group, logits, peaks, totals, block, num_pages, num_blocks):
    """Logits [pages, heads] of a block, -inf for pages that are no candidates, and its share of the softmax's sums."""
    peak = tl.max(page_logit, 0)
    total = tl.sum(tl.exp(page_logit - tl.where(peak == float("-inf"), 0.0, peak)[None, :]), 0)
    to = head[None, :] * num_pages + page[:, None]
    tl.store(logits + to, page_logit, mask=in_group[None, :] & (page < num_pages)[:, None])
    tl.store(peaks + head * num_blocks + block, peak, mask=in_group)
    tl.store(totals + head * num_blocks + block, total, mask=in_group)


@triton.jit
def token_logits_kernel(
    query,
    query_codes,
    query_lengths,
    index,
    num_candidates,
    missed,
    logits,
    peaks,
    totals,
    scale,
    num_kv_heads,
    num_pages,
    num_blocks,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HASHED: tl.constexpr,
    DOT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(missed + row) != 0:
        lane = tl.arange(0, BLOCK * PAGE_PAD)
        last = tl.minimum(tl.load(num_candidates + row // num_kv_heads), num_pages - 1)
        token_page = block * BLOCK + lane // PAGE_PAD
        valid = (token_page >= 1) & (token_page <= last) & (lane % PAGE_PAD < PAGE)
        token = (row * num_pages + token_page) * PAGE + lane % PAGE_PAD
        member = tl.program_id(2) * MEMBERS + tl.arange(0, MEMBERS)
        in_group = member < GROUP
        head = row * GROUP + member
        if HASHED:
            distance = tl.zeros([BLOCK * PAGE_PAD, MEMBERS], tl.int32)
            for word in tl.static_range(4):
                theirs = tl.load(index + token * 4 + word, mask=valid, other=0)
                ours = tl.load(query_codes + head * 4 + word, mask=in_group, other=0)
                distance += bits_set(theirs[:, None] ^ ours[None, :])
            cosine = tl.cos(distance.to(tl.float32) * 0.02454369260617026)  # pi / 128
            logit = tl.load(query_lengths + head, mask=in_group, other=0.0)[None, :] * cosine * scale
        else:
            WORDS: tl.constexpr = DIM // 8 + 1
            coded = tl.zeros([BLOCK * PAGE_PAD, MEMBERS], tl.float32)
            whole = tl.zeros([MEMBERS], tl.float32)
            step, low = unpack_scales(tl.load(index + token * WORDS + DIM // 8, mask=valid, other=0))
            for first in range(0, DIM, PART):
                dim = first + tl.arange(0, PART)
                word = first // 8 + tl.arange(0, PART // 8)
                inside = valid[:, None] & (word < DIM // 8)[None, :]
                words = tl.load(index + token[:, None] * WORDS + word[None, :], mask=inside, other=0)
                given = in_group[:, None] & (dim < DIM)[None, :]
                q = tl.load(query + head[:, None] * DIM + dim[None, :], mask=given, other=0.0)
                whole += tl.sum(q.to(tl.float32), 1)
                coded += tl.dot(unpack_4bit(words).to(DOT), tl.trans(q.to(DOT)), input_precision="ieee")
            logit = (coded * step[:, None] + low[:, None] * whole[None, :]) * scale
        logit = tl.where(valid[:, None], logit, float("-inf"))

        tokens = tl.reshape(logit, [BLOCK, PAGE_PAD, MEMBERS])
        top = tl.max(tokens, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.sum(tl.exp(tokens - top[:, None, :]), 1)
        page = block * BLOCK + tl.arange(0, BLOCK)
        candidate = ((page >= 1) & (page <= last))[:, None]
        page_logit = tl.where(candidate, top + tl.log(tl.where(candidate, mass, 1.0)), float("-inf"))
        store_logits(page_logit, page, head, in_group, logits, peaks, totals, block, num_pages, num_blocks)


def pages_of_block(page_size: int) -> int:
    """Pages that one program scores."""
    return max(1, TOKEN_BLOCK // int(triton.next_power_of_2(page_size)))


def group_sizes(query: torch.Tensor, num_kv_heads: int, most: int = MOST_MEMBERS) -> dict[str, Any]:
    """How kernels that multiply queries with an index go through heads of a group and their dimensions."""
    group, head_dim = query.shape[1] // num_kv_heads, query.shape[2]
    members = min(most, max(16, int(triton.next_power_of_2(group))))
    padded = int(triton.next_power_of_2(head_dim))
    part = PART if padded > WHOLE or members > 16 else WHOLE
    return {
        "GROUP": group,
        "MEMBERS": members,
        "DIM": head_dim,
        "PART": min(padded, EXACT_PART if query.dtype == torch.float32 else part),
        # the interpreter cannot multiply bfloat16 matrices
        "DOT": tl.float32 if INTERPRETED else TRITON_TYPES[query.dtype],
    }


def launch_token_logits(
    query: torch.Tensor,
    index: torch.Tensor,
    planes: torch.Tensor | None,
    num_candidates: torch.Tensor,
    missed: torch.Tensor,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
) -> None:
    """Fill logits, and each block's peaks and totals of the softmax. The caller has checked the arguments."""
    batch, heads, num_pages, page_size, _ = index.shape
    num_vectors, head_dim = query.shape[0] * query.shape[1], query.shape[2]
    sizes = group_sizes(query, heads, MOST_MEMBERS if planes is None else MOST_HASHED)
    codes, lengths = query, query  # of 4-bit keys neither is read
    if planes is not None:
        codes = torch.empty(num_vectors, HASH_WORDS, dtype=torch.int32, device=query.device)
        lengths = torch.empty(num_vectors, dtype=torch.float32, device=query.device)
        hash_query_kernel[(triton.cdiv(num_vectors, HASHED_AT_ONCE),)](
            query,
            planes,
            codes,
            lengths,
            num_vectors,
            DIM=head_dim,
            PART=min(HASHED_PART, sizes["PART"]),
            ROWS=HASHED_AT_ONCE,
            num_warps=4,
            **FUSED,
        )
        scale *= math.sqrt(head_dim)  # keys are taken to be this long
    block = pages_of_block(page_size)
    num_blocks = triton.cdiv(num_pages, block)
    token_logits_kernel[(batch * heads, num_blocks, triton.cdiv(sizes["GROUP"], sizes["MEMBERS"]))](
        query,
        codes,
        lengths,
        index,
        num_candidates,
        missed.view(torch.uint8),
        *statistics,
        scale,
        heads,
        num_pages,
        num_blocks,
        **sizes,
        PAGE=page_size,
        PAGE_PAD=triton.next_power_of_2(page_size),
        BLOCK=block,
        HASHED=planes is not None,
        num_warps=4,
        **FUSED,
    )
