"""The shape of multi-head latent attention. Knows nothing about the rest of a model."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from clo.specs.base import Spec


class LatentSpec(Spec):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): a layer caches one vector a token for all its heads.

    It holds `kv_rank` values, from which two maps make every head's keys and values, and a key of `rope_dim` values
    with the position, the same for all heads. A decode step never makes those keys and values: it maps queries into
    the vectors' space before attention, and maps what attention gives back after it.
    """

    kv_rank: PositiveInt = Field(description="cached values of a token that keys and values are made from")
    rope_dim: PositiveInt = Field(description="cached values of a token with its position; part of every head's key")
    nope_dim: PositiveInt = Field(description="width of the other part of a head's key, made from the cached values")
    value_dim: PositiveInt = Field(description="width of a head's value")
    query_rank: NonNegativeInt = Field(default=0, description="width queries are made from; 0: from the hidden state")

    @property
    def vector_dim(self) -> int:
        """Width of what is cached for a token, and of a query that attends to it."""
        return self.kv_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Width of one head's query as it is projected."""
        return self.nope_dim + self.rope_dim

    def map_values(self, num_heads: int) -> int:
        """Weights of the two maps of `num_heads` heads."""
        return num_heads * self.kv_rank * (self.nope_dim + self.value_dim)
