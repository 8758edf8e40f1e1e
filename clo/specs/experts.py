"""The shape of a mixture of experts. Knows nothing about the rest of a model."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clo.specs.base import Spec


class ExpertsSpec(Spec):
    """A mixture of experts where other models have an MLP: a router sends every token through a few gated MLPs."""

    num_experts: PositiveInt = Field(description="experts of a layer")
    experts_per_token: PositiveInt = Field(description="experts that a token passes")
    intermediate_size: PositiveInt = Field(description="width of one expert")
    shared_intermediate_size: NonNegativeInt = Field(
        default=0, description="width of the shared expert, which every token passes"
    )
    dense_layers: NonNegativeInt = Field(default=0, description="first layers, which have an MLP instead of experts")
    layers: tuple[NonNegativeInt, ...] = Field(
        default=(), description="layers with experts, counted from 0; none: all but the first dense_layers"
    )
    weight_bytes_per_value: float | None = Field(
        default=None, gt=0, description="bytes a weight of an expert takes, scales included; none: as of MLPs"
    )

    @model_validator(mode="after")
    def _enough(self) -> ExpertsSpec:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} must be at most num_experts = {self.num_experts}"
            )
        if self.layers and (self.dense_layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(
                f"layers = {list(self.layers)}: each once, in their order, and dense_layers = {self.dense_layers} "
                "must be 0 beside them"
            )
        return self

    def are_in(self, layer: int) -> bool:
        """Whether that layer has experts."""
        return layer in self.layers if self.layers else layer >= self.dense_layers

    def used_by(self, tokens: Any) -> Any:
        """How many experts of a layer `tokens` tokens pass, in the mean, if routing is even and independent.

        Of a number a number, of an array an array.
        """
        missed = (1.0 - self.experts_per_token / self.num_experts) ** tokens
        return self.num_experts * (1.0 - missed)

    def shard(self, num_gpus: int) -> ExpertsSpec:
        """What each of `num_gpus` GPUs holds: a part of every expert, and the router."""
        return self.with_fields(
            intermediate_size=math.ceil(self.intermediate_size / num_gpus),
            shared_intermediate_size=math.ceil(self.shared_intermediate_size / num_gpus),
        )
