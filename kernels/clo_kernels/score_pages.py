"""Scores pages by the index of their keys, for the heads that missed.

An index of two vectors a page, elementwise minimum and maximum, bounds the page's largest query-key product; one of one
vector, the mean, estimates it; one of single tokens (`token_logits`) estimates the attention that falls on the page. A
query head's logits become shares of a softmax over the candidates; a group's shares are averaged. Two launches: logits
with each block's softmax statistics, then the fold. Does not know how many pages will be selected. Not yet run on a
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, check_tensor, group_size, require
from clo_kernels.dispatch import FUSED, on_device, runs_kernel
from clo_kernels.layout import INT32
from clo_kernels.page_index import check_index
from clo_kernels.token_logits import group_sizes, launch_token_logits, pages_of_block, store_logits

LOGIT_BLOCK = 32
FOLD_BLOCK = 1024
FOLD_VALUES = 8192
"""Logits that a program holds at once, and sums of blocks: those of several query heads where there are few."""


@triton.jit
def _finite(bound, LARGEST: tl.constexpr):
    """What is no number stays so."""
    bound = tl.where(bound == float("inf"), LARGEST, bound)
    return tl.where(bound == float("-inf"), -LARGEST, bound)


@triton.jit
def page_logits_kernel(
    query,
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
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """The larger of two products, by minimum and by maximum, is the latter's where the query is positive."""
    LARGEST: tl.constexpr = 65504.0 if tl.float16 == DOT else 3.3895313892515355e38
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(missed + row) != 0:
        page = block * BLOCK + tl.arange(0, BLOCK)
        candidate = (page >= 1) & (page <= tl.load(num_candidates + row // num_kv_heads)) & (page < num_pages)
        member = tl.program_id(2) * MEMBERS + tl.arange(0, MEMBERS)
        in_group = member < GROUP
        head = row * GROUP + member
        product = tl.zeros([BLOCK, MEMBERS], tl.float32)
        for first in range(0, DIM, PART):
            dim = first + tl.arange(0, PART)
            at = ((row * num_pages + page) * VECTORS * DIM)[:, None] + dim[None, :]
            inside = candidate[:, None] & (dim < DIM)[None, :]
            given = in_group[:, None] & (dim < DIM)[None, :]
            q = tl.load(query + head[:, None] * DIM + dim[None, :], mask=given, other=0.0).to(DOT)
            low = tl.load(index + at, mask=inside, other=0.0).to(DOT)
            if VECTORS == 2:
                high = tl.load(index + at + DIM, mask=inside, other=0.0).to(DOT)
                # else it would be lost where the query has the other sign: zero times infinity is no number
                low = _finite(low, LARGEST)
                high = _finite(high, LARGEST)
                none = tl.zeros([MEMBERS, PART], DOT)
                product += tl.dot(high, tl.trans(tl.where(q > 0, q, none)), input_precision="ieee")
                # what is no number is not lost
                product += tl.dot(low, tl.trans(tl.where(q > 0, none, q)), input_precision="ieee")
            else:
                product += tl.dot(low, tl.trans(q), input_precision="ieee")
        page_logit = tl.where(candidate[:, None], product * scale, float("-inf"))
        store_logits(page_logit, page, head, in_group, logits, peaks, totals, block, num_pages, num_blocks)


@triton.jit
def fold_scores_kernel(
    missed,
    logits,
    peaks,
    totals,
    scores,
    num_pages,
    num_blocks,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    BLOCKS_PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(missed + row) != 0:
        page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        share = tl.zeros([BLOCK], tl.float32)
        for first in range(0, GROUP, MEMBERS):
            member = first + tl.arange(0, MEMBERS)
            in_group = (member < GROUP)[:, None]
            head = (row * GROUP + member)[:, None]
            highest = tl.full([MEMBERS, 1], float("-inf"), tl.float32)
            total = tl.zeros([MEMBERS, 1], tl.float32)
            for start in range(0, BLOCKS_PAD, BLOCKS_PART):
                block = start + tl.arange(0, BLOCKS_PART)
                given = in_group & (block < num_blocks)[None, :]
                peak = tl.load(peaks + head * num_blocks + block[None, :], mask=given, other=float("-inf"))
                sums = tl.load(totals + head * num_blocks + block[None, :], mask=given, other=0.0)
                raised = tl.maximum(highest, tl.max(peak, 1)[:, None])
                base = tl.where(raised == float("-inf"), 0.0, raised)
                total = total * tl.exp(highest - base) + tl.sum(sums * tl.exp(peak - base), 1)[:, None]
                highest = raised
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            total = tl.where(total > 0, total, 1.0)  # no candidates
            inside = in_group & (page < num_pages)[None, :]
            logit = tl.load(logits + head * num_pages + page[None, :], mask=inside, other=float("-inf"))
            part = tl.where(logit == float("-inf"), float("-inf"), tl.exp(logit - highest) / total)
            share += tl.sum(tl.where(in_group, part, 0.0), 0)
        tl.store(scores + row * num_pages + page, share / GROUP, mask=page < num_pages)


def score_pages(
    query: torch.Tensor,
    index: torch.Tensor,
    num_candidates: torch.Tensor,
    missed: torch.Tensor,
    *,
    scale: float | None = None,
    planes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scores, float32 [batch, num_kv_heads, num_pages]; -inf for pages that are no candidates.

    `query` is [batch, num_query_heads, head_dim]; `index` [batch, num_kv_heads, num_pages, *entry] one of the layouts
    in `page_index`, of floats in the query's dtype, and `planes` float32 [128, head_dim] those of a sign hash. Pages 1
    to `num_candidates` (int32 [batch]) are candidates. Rows of heads that did not miss (`missed`, bool
    [batch, num_kv_heads]) are left as they are. `scale` is 1 / sqrt(head_dim) by default.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    batch, num_query_heads, head_dim = query.shape
    kind = check_index(index, (batch, -1), head_dim, planes, query.device)
    _, heads, num_pages, vectors, _ = index.shape
    require(num_pages > 0, f"index: {num_pages} pages, expected at least one")
    require(
        kind.of_tokens or index.dtype == query.dtype,
        f"index: dtype {index.dtype}, expected that of the query, {query.dtype}",
    )
    group = group_size(num_query_heads, heads)
    check_tensor("num_candidates", num_candidates, (batch,), INT32, query.device)
    check_tensor("missed", missed, (batch, heads), torch.bool, query.device)
    if out is None:
        out = torch.empty(batch, heads, num_pages, dtype=torch.float32, device=query.device)
    check_tensor("out", out, (batch, heads, num_pages), torch.float32, query.device)
    scale = head_dim**-0.5 if scale is None else scale
    if not runs_kernel(query):
        return reference.score_pages(query, index, num_candidates, missed, scale=scale, planes=planes, out=out)
    if batch == 0:
        return out
    num_blocks = triton.cdiv(num_pages, pages_of_block(vectors) if kind.of_tokens else LOGIT_BLOCK)
    statistics = tuple(
        torch.empty(batch * num_query_heads, width, dtype=torch.float32, device=query.device)
        for width in (num_pages, num_blocks, num_blocks)
    )
    with on_device(query):
        if kind.of_tokens:
            launch_token_logits(query, index, planes, num_candidates, missed, statistics, scale)
        else:
            sizes = group_sizes(query, heads)
            page_logits_kernel[(batch * heads, num_blocks, triton.cdiv(group, sizes["MEMBERS"]))](
                query,
                index,
                num_candidates,
                missed.view(torch.uint8),
                *statistics,
                scale,
                heads,
                num_pages,
                num_blocks,
                **sizes,
                VECTORS=vectors,
                BLOCK=LOGIT_BLOCK,
                num_warps=4,
                **FUSED,
            )
        blocks_pad = int(triton.next_power_of_2(num_blocks))
        blocks_part = min(blocks_pad, FOLD_VALUES)
        members = max(1, min(int(triton.next_power_of_2(group)), FOLD_VALUES // max(FOLD_BLOCK, blocks_part)))
        fold_scores_kernel[(batch * heads, triton.cdiv(num_pages, FOLD_BLOCK))](
            missed.view(torch.uint8),
            *statistics,
            out,
            num_pages,
            num_blocks,
            GROUP=group,
            MEMBERS=members,
            BLOCKS_PAD=blocks_pad,
            BLOCKS_PART=blocks_part,
            BLOCK=FOLD_BLOCK,
            num_warps=4,
            **FUSED,
        )
    return out
