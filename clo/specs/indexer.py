"""The shape of an indexer, by which a model itself chooses what it attends to. Knows nothing of the rest of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from clo.specs.base import Spec


class IndexerSpec(Spec):
    """Small heads that score every cached token by one key each; attention is to the best.

    Two kinds are known. With latent attention (DeepSeek Sparse Attention, DeepSeek-V3.2) their queries come from the
    low rank of attention's queries; the best `top_tokens` by the sum of weighted, rectified products are what all heads
    attend to. With keys and values in every head (MiniMax Sparse Attention, arXiv 2606.13392) each KV head has one such
    head of its own and attends to the blocks of `block_tokens` that hold the best scores, the newest always among them.
    """

    num_heads: PositiveInt = Field(description="query heads that score; they share one key a token")
    head_dim: PositiveInt = Field(description="width of such a query, and of the key")
    top_tokens: PositiveInt = Field(description="tokens that a head attends to")
    block_tokens: PositiveInt = Field(default=1, description="tokens that are chosen together, a block from its start")
    key_bytes: float = Field(
        default=132.0,
        gt=0,
        description="bytes of a cached key: as DeepSeek's, 128 of fp8 and a float32 scale (128 of bf16: 256)",
    )
    dense_layers: NonNegativeInt = Field(default=0, description="first layers, which attend to everything")
    shared_layers: tuple[NonNegativeInt, ...] = Field(
        default=(), description="layers without an indexer, which attend to what the last layer with one chose"
    )

    @field_validator("shared_layers")
    @classmethod
    def _after_one_that_chooses(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError("must ascend")
        if 0 in value:
            raise ValueError("the first layer has nothing to share: no layer before it chooses")
        return value

    @model_validator(mode="after")
    def _whole_blocks(self) -> IndexerSpec:
        if self.block_tokens > 1 and (self.top_tokens % self.block_tokens or self.top_tokens == self.block_tokens):
            raise ValueError(
                f"top_tokens = {self.top_tokens} must be two or more blocks of block_tokens = {self.block_tokens}"
            )
        if self.shared_layers and self.shared_layers[0] <= self.dense_layers:
            raise ValueError(
                f"shared_layers: {self.shared_layers[0]} has nothing to share: no layer before it chooses "
                f"(dense_layers = {self.dense_layers})"
            )
        return self

    def chooses_in(self, layer: int) -> bool:
        """Whether a layer has an indexer of its own."""
        return layer >= self.dense_layers and layer not in self.shared_layers

    def design_fields(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What a `Design` that says so much leaves open, as the model attends.

        To these tokens and the newest block, which counts as one of theirs where blocks are more than a token. Other
        pages, which another selector chooses, hold as many tokens; a `budget_fraction` that is said counts.
        """
        fields = {
            "selector": "indexer",
            "page_size": self.block_tokens,
            "num_sink_tokens": 0,
            "recent_window_tokens": self.block_tokens,
            "dense_layers": self.dense_layers,
        }
        if "budget_fraction" in said:
            return fields
        page_size = said.get("page_size", self.block_tokens)
        valid = isinstance(page_size, int) and page_size > 0  # if not, an error of the design says so
        return fields | {"budget_pages": math.ceil(self.older_tokens / page_size) if valid else self.older_tokens}

    @property
    def older_tokens(self) -> int:
        """Tokens it chooses before the newest block."""
        return self.top_tokens - (self.block_tokens if self.block_tokens > 1 else 0)

    @property
    def query_width(self) -> int:
        """All heads' queries of a token."""
        return self.num_heads * self.head_dim

    def shard(self, num_kv_heads: int) -> IndexerSpec:
        """What a GPU that has so many of the KV heads needs of it, where each has a head of its own: those, the key."""
        return self.with_fields(num_heads=num_kv_heads)
