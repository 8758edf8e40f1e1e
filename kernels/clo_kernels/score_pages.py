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
from clo_kernels.dispatch import on_device, runs_kernel
from clo_kernels.layout import INT32
from clo_kernels.page_index import check_index
from clo_kernels.token_logits import launch_token_logits, pages_of_block

LOGIT_BLOCK = 32
FOLD_BLOCK = 1024


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
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if tl.load(missed + row) != 0:
        page = block * BLOCK + tl.arange(0, BLOCK)
        candidate = (page >= 1) & (page <= tl.load(num_candidates + row // num_kv_heads)) & (page < num_pages)
        dim = tl.arange(0, DIM_PAD)
        at = ((row * num_pages + page) * VECTORS * DIM)[:, None] + dim[None, :]
        inside = candidate[:, None] & (dim < DIM)[None, :]
        first = tl.load(index + at, mask=inside, other=0.0).to(tl.float32)
        if VECTORS == 2:
            second = tl.load(index + at + DIM, mask=inside, other=0.0).to(tl.float32)
        for member in range(GROUP):
            head = row * GROUP + member
            q = tl.load(query + head * DIM + dim, mask=dim < DIM, other=0.0).to(tl.float32)[None, :]
            if VECTORS == 2:
                logit = tl.sum(tl.maximum(q * first, q * second), 1) * scale
            else:
                logit = tl.sum(q * first, 1) * scale
            logit = tl.where(candidate, logit, float("-inf"))
            peak = tl.max(logit, 0)
            total = tl.sum(tl.exp(logit - tl.where(peak == float("-inf"), 0.0, peak)), 0)
            tl.store(logits + head * num_pages + page, logit, mask=page < num_pages)
            tl.store(peaks + head * num_blocks + block, peak)
            tl.store(totals + head * num_blocks + block, total)


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
    BLOCKS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(missed + row) != 0:
        page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        block = tl.arange(0, BLOCKS_PAD)
        share = tl.zeros([BLOCK], tl.float32)
        for member in range(GROUP):
            head = row * GROUP + member
            peak = tl.load(peaks + head * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
            total = tl.load(totals + head * num_blocks + block, mask=block < num_blocks, other=0.0)
            highest = tl.max(peak, 0)
            highest = tl.where(highest == float("-inf"), 0.0, highest)
            total = tl.sum(total * tl.exp(peak - highest), 0)
            total = tl.where(total > 0, total, 1.0)  # no candidates
            logit = tl.load(logits + head * num_pages + page, mask=page < num_pages, other=float("-inf"))
            share += tl.where(logit == float("-inf"), float("-inf"), tl.exp(logit - highest) / total)
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
    in `page_index`, and `planes` float32 [128, head_dim] those of a sign hash. Pages 1 to `num_candidates` (int32
    [batch]) are candidates. Rows of heads that did not miss (`missed`, bool [batch, num_kv_heads]) are left as they
    are. `scale` is 1 / sqrt(head_dim) by default.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    batch, num_query_heads, head_dim = query.shape
    kind = check_index(index, (batch, -1), head_dim, planes, query.device)
    _, heads, num_pages, vectors, _ = index.shape
    require(num_pages > 0, f"index: {num_pages} pages, expected at least one")
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
            page_logits_kernel[(batch * heads, num_blocks)](
                query,
                index,
                num_candidates,
                missed.view(torch.uint8),
                *statistics,
                scale,
                heads,
                num_pages,
                num_blocks,
                GROUP=group,
                DIM=head_dim,
                DIM_PAD=triton.next_power_of_2(head_dim),
                VECTORS=vectors,
                BLOCK=LOGIT_BLOCK,
                num_warps=4,
            )
        fold_scores_kernel[(batch * heads, triton.cdiv(num_pages, FOLD_BLOCK))](
            missed.view(torch.uint8),
            *statistics,
            out,
            num_pages,
            num_blocks,
            GROUP=group,
            BLOCKS_PAD=triton.next_power_of_2(num_blocks),
            BLOCK=FOLD_BLOCK,
            num_warps=4,
        )
    return out
