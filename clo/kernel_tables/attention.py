"""Tables of attention of one new token: over keys and values, and over the vectors of latent attention."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat

from clo.kernel_tables.table import BYTES_PER_VALUE, Axis, KernelTable

_KV_BYTES = "of a cached value, 2 or 1: fp8 caches, for arithmetic in bfloat16"


class DecodeAttentionTable(KernelTable):
    """Time of attention of one new token per sequence over a KV cache of `kv_tokens` tokens, bfloat16 or fp8.

    `num_query_heads` and `num_kv_heads` are those of one GPU. Where `min_query_heads_per_kv_head` is 2, multi-head
    attention (one query head per KV head) runs a slower kernel of its own that the table leaves out: it is priced as
    grouped-query attention, which is too low for small batches of long sequences.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("batch", "num_query_heads", "num_kv_heads", "head_dim", "kv_tokens")

    batch: Axis
    num_query_heads: Axis
    num_kv_heads: Axis
    head_dim: Axis
    kv_tokens: Axis
    kv_bytes: PositiveFloat = Field(default=2.0, description=_KV_BYTES)
    measured_head_dim: tuple[int, ...] = Field(default=(), description="the others were scaled along the roofline")
    min_query_heads_per_kv_head: NonNegativeInt = Field(default=1, description="of the fitted points")

    def roofline_seconds(
        self, batch: Any, num_query_heads: Any, num_kv_heads: Any, head_dim: Any, kv_tokens: Any
    ) -> Any:
        """`max(bytes / HBM bandwidth, flops / peak)`: keys and values read once, queries read, outputs written."""
        cached, beside = (2.0 * batch * head_dim * rows for rows in (num_kv_heads * kv_tokens, num_query_heads))
        num_bytes = self.kv_bytes * cached + BYTES_PER_VALUE * beside
        flops = 4.0 * batch * num_query_heads * kv_tokens * head_dim
        return np.maximum(num_bytes / self.hbm_bytes_per_s, flops / self.flops_per_s)


class LatentAttentionTable(KernelTable):
    """Time of latent attention of one new token per sequence over `kv_tokens` vectors of `VECTOR_DIM` values.

    `num_query_heads` are those of one GPU: they share the vectors.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("batch", "num_query_heads", "kv_tokens")
    KV_RANK: ClassVar[int] = 512
    VECTOR_DIM: ClassVar[int] = 576

    batch: Axis
    num_query_heads: Axis
    kv_tokens: Axis
    kv_bytes: PositiveFloat = Field(default=2.0, description=_KV_BYTES)

    def roofline_seconds(self, batch: Any, num_query_heads: Any, kv_tokens: Any) -> Any:
        """`max(bytes / HBM bandwidth, flops / peak)`: vectors read once, queries read, outputs written."""
        wide = self.VECTOR_DIM + self.KV_RANK
        num_bytes = batch * (self.kv_bytes * self.VECTOR_DIM * kv_tokens + BYTES_PER_VALUE * wide * num_query_heads)
        flops = 2.0 * batch * num_query_heads * kv_tokens * wide
        return np.maximum(num_bytes / self.hbm_bytes_per_s, flops / self.flops_per_s)
