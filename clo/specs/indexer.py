"""The shape of an indexer, by which a model itself chooses what it attends to. Knows nothing of the rest of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from clo.specs.base import Spec


class IndexerSpec(Spec):
    """The indexer of DeepSeek Sparse Attention (DeepSeek-V3.2): small heads that score every cached token.

    Its queries come from the low rank of attention's queries, its one key a token and the weights of its heads from the
    hidden state. The best `top_tokens` by the sum of weighted, rectified products are what all heads attend to.
    """

    num_heads: PositiveInt = Field(description="query heads that score; they share one key a token")
    head_dim: PositiveInt = Field(description="width of such a query, and of the key")
    top_tokens: PositiveInt = Field(description="tokens that every head of a layer attends to")
    key_bytes: float = Field(
        default=132.0, gt=0, description="bytes of a cached key: 128 of fp8, and a float32 scale, as released"
    )
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

    def design_fields(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What a `Design` that says so much leaves open, as the model attends: in all layers to these tokens, and one.

        That is the newest. Larger pages, which another selector chooses, hold as many tokens; a `budget_fraction` that
        is said counts.
        """
        fields = {
            "selector": "indexer",
            "page_size": 1,
            "num_sink_tokens": 0,
            "recent_window_tokens": 1,
            "dense_layers": 0,
        }
        if "budget_fraction" in said:
            return fields
        page_size = said.get("page_size", 1)
        valid = isinstance(page_size, int) and page_size > 0  # if not, an error of the design says so
        return fields | {"budget_pages": math.ceil(self.top_tokens / page_size) if valid else self.top_tokens}

    @property
    def query_width(self) -> int:
        """All heads' queries of a token."""
        return self.num_heads * self.head_dim
