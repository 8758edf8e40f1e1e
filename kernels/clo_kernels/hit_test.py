"""Cosine of every query with its head's anchor, folded per KV head: who keeps its pages, who selects anew.

One launch for all sequences and heads of a layer. Moves the anchors of heads that missed. Does not know where the query
comes from (this layer, or predicted for it) and what a miss leads to. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clo_kernels import reference
from clo_kernels.checks import FLOATS, check_tensor, group_size, require
from clo_kernels.dispatch import FUSED, on_device, runs_kernel

FOLDS = ("mean", "min", "importance")
PROGRAM_VALUES = 8192
"""Of queries, and of anchors, that a program holds at once: of more it goes through parts."""
WARP_VALUES = 1024
MAX_WARPS = 32


@triton.jit
def _part(query, anchor, at, in_group, first, DIM: tl.constexpr, PART: tl.constexpr):
    """Of values from `first` on: the query's, and per member sums of squares, of products, and of anchors not zero."""
    dim = first + tl.arange(0, PART)
    inside = in_group[:, None] & (dim < DIM)[None, :]
    raw = tl.load(query + at + dim[None, :], mask=inside, other=0.0)
    now = raw.to(tl.float32)
    then = tl.load(anchor + at + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    anchored = tl.sum((then != 0).to(tl.int32), 1)
    return raw, tl.sum(now * now, 1), tl.sum(then * then, 1), tl.sum(now * then, 1), anchored


@triton.jit
def hit_test_kernel(
    query,
    anchor,
    tau,
    importance,
    missed,
    num_kv_heads,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    PART: tl.constexpr,
    FOLD: tl.constexpr,
):
    row = tl.program_id(0)  # sequence * num_kv_heads + KV head
    head = row % num_kv_heads
    member = tl.arange(0, GROUP_PAD)
    in_group = member < GROUP
    at = (row.to(tl.int64) * GROUP + member)[:, None] * DIM
    raw, ours, theirs, both, anchored = _part(query, anchor, at, in_group, 0, DIM, PART)
    for first in range(PART, DIM, PART):
        _, more_ours, more_theirs, more_both, more_anchored = _part(query, anchor, at, in_group, first, DIM, PART)
        ours += more_ours
        theirs += more_theirs
        both += more_both
        anchored += more_anchored

    norms = tl.sqrt(ours) * tl.sqrt(theirs)
    cosine = tl.where(norms == 0, 0.0, both / tl.where(norms == 0, 1.0, norms))
    if FOLD == "min":
        # a NaN must not lose against a number
        broken = tl.sum((in_group & (cosine != cosine)).to(tl.int32), 0) > 0
        folded = tl.where(broken, float("nan"), tl.min(tl.where(in_group, cosine, float("inf")), 0))
    elif FOLD == "importance":
        weight = tl.load(importance + head * GROUP + member, mask=in_group, other=0.0)
        folded = tl.sum(weight * cosine, 0) / tl.sum(weight, 0)
    else:
        folded = tl.sum(tl.where(in_group, cosine, 0.0), 0) / GROUP
    folded = tl.where(tl.sum(anchored, 0) > 0, folded, float("-inf"))

    hit = folded >= tl.load(tau + head)
    tl.store(missed + row, tl.where(hit, 0, 1).to(tl.uint8))
    if hit == 0:
        dim = tl.arange(0, PART)
        tl.store(anchor + at + dim[None, :], raw, mask=in_group[:, None] & (dim < DIM)[None, :])
        for first in range(PART, DIM, PART):  # of more than a part the rest is read again
            inside = in_group[:, None] & (first + dim < DIM)[None, :]
            more = tl.load(query + at + (first + dim)[None, :], mask=inside, other=0.0)
            tl.store(anchor + at + (first + dim)[None, :], more, mask=inside)


def hit_test(
    query: torch.Tensor,
    anchor: torch.Tensor,
    tau: torch.Tensor,
    *,
    fold: str = "mean",
    importance: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Miss mask [batch, num_kv_heads]; `query` becomes the anchor of heads that missed.

    `query` and `anchor` are [batch, num_query_heads, head_dim], `tau` float32 [num_kv_heads], `importance` float32
    [num_query_heads]. A head hits while its folded cosine is at least tau; not a number is a miss. A zero vector has
    cosine 0; a head whose anchors are all zero has none yet and misses unless tau is -inf, which marks heads that never
    select.
    """
    check_tensor("query", query, (-1, -1, -1), FLOATS)
    batch, num_query_heads, head_dim = query.shape
    check_tensor("anchor", anchor, (batch, num_query_heads, head_dim), query.dtype, query.device)
    check_tensor("tau", tau, (-1,), torch.float32, query.device)
    num_kv_heads = tau.shape[0]
    group = group_size(num_query_heads, num_kv_heads)
    require(fold in FOLDS, f"fold = {fold!r}, expected one of {FOLDS}")
    require((fold == "importance") == (importance is not None), f"importance goes with fold = importance, not {fold}")
    if importance is not None:
        check_tensor("importance", importance, (num_query_heads,), torch.float32, query.device)
    if out is None:
        out = torch.empty(batch, num_kv_heads, dtype=torch.bool, device=query.device)
    check_tensor("out", out, (batch, num_kv_heads), torch.bool, query.device)
    if not runs_kernel(query):
        return reference.hit_test(query, anchor, tau, fold=fold, importance=importance, out=out)
    if batch:
        members = int(triton.next_power_of_2(group))
        part = max(16, min(int(triton.next_power_of_2(head_dim)), PROGRAM_VALUES // members))
        with on_device(query):
            hit_test_kernel[(batch * num_kv_heads,)](
                query,
                anchor,
                tau,
                tau if importance is None else importance,
                out.view(torch.uint8),
                num_kv_heads,
                GROUP=group,
                GROUP_PAD=members,
                DIM=head_dim,
                PART=part,
                FOLD=str(fold),
                num_warps=max(1, min(MAX_WARPS, members * part // WARP_VALUES)),
                **FUSED,
            )
    return out
