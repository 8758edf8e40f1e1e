"""The shape of linear attention in a hybrid model. Knows nothing about the rest of a model."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from clo.specs.base import Spec


class LinearSpec(Spec):
    """Gated DeltaNet (arXiv 2412.06464) in the layers of a hybrid model that keep no keys and values.

    Each value head keeps a state `[key_dim, value_dim]` that every token changes: it is as large after a million tokens
    as after one. Queries, keys and values pass a short causal convolution first.
    """

    layers: tuple[NonNegativeInt, ...] = Field(description="layers with linear attention, counted from 0")
    num_key_heads: PositiveInt = Field(description="heads of queries, and of keys")
    num_value_heads: PositiveInt = Field(description="heads of values, gates and states")
    key_dim: PositiveInt = Field(description="width of such a query, and of a key")
    value_dim: PositiveInt = Field(description="width of a value")
    conv_tokens: PositiveInt = Field(default=4, description="tokens that the convolution spans, the new one included")
    state_bytes_per_value: float = Field(default=4.0, gt=0, description="bytes a value of a state takes (float32: 4)")

    @field_validator("layers")
    @classmethod
    def _in_order(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            raise ValueError("must name at least one layer, and ascend")
        return value

    @model_validator(mode="after")
    def _grouped_evenly(self) -> LinearSpec:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads = {self.num_value_heads} must be a multiple of num_key_heads = {self.num_key_heads}"
            )
        return self

    @property
    def value_width(self) -> int:
        """All heads' values of a token; as wide is their gate, and what attention gives."""
        return self.num_value_heads * self.value_dim

    @property
    def conv_width(self) -> int:
        """All heads' queries, keys and values of a token."""
        return 2 * self.num_key_heads * self.key_dim + self.value_width

    @property
    def state_bytes(self) -> float:
        """What a layer keeps of a sequence: the states, and the tokens that the next convolution spans (bf16)."""
        states = self.value_width * self.key_dim * self.state_bytes_per_value
        return states + (self.conv_tokens - 1) * self.conv_width * 2.0

    @property
    def step_bytes(self) -> float:
        """What a decode step of one sequence moves in a layer: the state in and out, the new token in bf16."""
        return 2 * self.state_bytes + 2.0 * (2 * self.conv_width + self.value_width)

    @property
    def flops(self) -> float:
        """Arithmetic of a token in a decode step: three products of a vector and a state in every value head."""
        return 6.0 * self.value_width * self.key_dim

    def shard(self, parts: int) -> LinearSpec:
        """What each of `parts` GPUs holds: its heads. They must divide evenly."""
        return self.with_fields(
            num_key_heads=self.num_key_heads // parts, num_value_heads=self.num_value_heads // parts
        )
