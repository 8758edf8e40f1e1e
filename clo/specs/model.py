"""What a transformer looks like to an offloading decoder: shapes and bytes. Knows nothing about weights or machines."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clo.errors import SpecError
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

    @model_validator(mode="after")
    def _enough(self) -> ExpertsSpec:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token} must be at most num_experts = {self.num_experts}"
            )
        return self

    def used_by(self, tokens: Any) -> Any:
        """How many experts of a layer `tokens` tokens pass, in the mean, if routing is even and independent.

        Of a number a number, of an array an array.
        """
        missed = (1.0 - self.experts_per_token / self.num_experts) ** tokens
        return self.num_experts * (1.0 - missed)

    def shard(self, num_gpus: int) -> ExpertsSpec:
        """What each of `num_gpus` GPUs holds: a part of every expert, and the router."""
        return self.with_fields(
            intermediate_size=_part(self.intermediate_size, num_gpus),
            shared_intermediate_size=_part(self.shared_intermediate_size, num_gpus),
        )


class ModelSpec(Spec):
    """A Llama/Qwen-style decoder: grouped-query attention, gated MLP or experts, one KV cache per layer."""

    name: str = Field(description="how reports call it")
    source: str = Field(default="", description="where the shape was read")
    num_layers: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt = Field(description="width of the gated MLP, in layers that have no experts")
    num_query_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_positions: PositiveInt = Field(description="longest context the model accepts, tokens")
    tied_embeddings: bool = False
    weight_bytes_per_value: float = Field(
        default=2.0,
        gt=0,
        description="bytes a weight of the layers takes (bf16: 2, fp8: 1); embeddings and head take 2 at least",
    )
    kv_bytes_per_value: float = Field(default=2.0, gt=0, description="bytes a key or value element takes (bf16: 2)")
    experts: ExpertsSpec | None = Field(default=None, description="a mixture of experts; none: an MLP in every layer")
    window_tokens: PositiveInt | None = Field(
        default=None, description="tokens that windowed layers attend to, and keep"
    )
    windowed_layers: tuple[NonNegativeInt, ...] = Field(
        default=(), description="layers with a sliding window, counted from 0: nothing of theirs is ever offloaded"
    )

    @model_validator(mode="after")
    def _grouped_evenly(self) -> ModelSpec:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads = {self.num_query_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.experts is not None and self.experts.dense_layers >= self.num_layers:
            raise ValueError(
                f"experts.dense_layers = {self.experts.dense_layers} must be less than num_layers = {self.num_layers}"
            )
        return self

    @model_validator(mode="after")
    def _windows(self) -> ModelSpec:
        places = self.windowed_layers
        if bool(places) != (self.window_tokens is not None):
            raise ValueError("windowed_layers and window_tokens go together: give both or none")
        if list(places) != sorted(set(places)):
            raise ValueError(f"windowed_layers = {list(places)} must ascend")
        if places and places[-1] >= self.num_layers:
            raise ValueError(f"windowed_layers: {places[-1]} must be less than num_layers = {self.num_layers}")
        if len(places) == self.num_layers:
            raise ValueError("windowed_layers must leave a layer that attends to the whole context")
        return self

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def head_token_bytes(self) -> float:
        """Key and value of one token in one KV head of one layer, bytes."""
        return 2 * self.head_dim * self.kv_bytes_per_value

    @property
    def layer_token_bytes(self) -> float:
        """Key and value of one token in one layer, bytes."""
        return self.head_token_bytes * self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one more token in all layers that keep the whole context, bytes (Llama-3-8B: 131,072)."""
        return self.layer_token_bytes * (self.num_layers - len(self.windowed_layers))

    def attended_at_most(self, layer: int, context_tokens: int) -> int:
        """Tokens that a layer keeps and attends to in full attention: all, or those in its window."""
        if self.window_tokens is None or layer not in self.windowed_layers:
            return context_tokens
        return min(context_tokens, self.window_tokens)

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection."""
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts."""
        return 0 if self.experts is None else self.num_layers - self.experts.dense_layers

    def experts_in(self, layer: int) -> ExpertsSpec | None:
        """The experts of a layer, if it has any."""
        return self.experts if layer >= self.num_layers - self.num_expert_layers else None

    def mlp_width(self, layer: int) -> int:
        """Width of the gated MLP that every token passes in a layer: where there are experts, of the shared one."""
        experts = self.experts_in(layer)
        return self.intermediate_size if experts is None else experts.shared_intermediate_size

    def layer_weight_values(self, layer: int, num_experts: float | None = None) -> float:
        """Weights of a layer, or of it with `num_experts` of its experts only (norms are negligible), values."""
        attention = self.hidden_size * (self.qkv_width + self.num_query_heads * self.head_dim)
        mlp = 3 * self.hidden_size * self.mlp_width(layer)
        experts = self.experts_in(layer)
        if experts is None:
            return attention + mlp
        router, one = self.hidden_size * experts.num_experts, 3 * self.hidden_size * experts.intermediate_size
        return attention + mlp + router + one * (experts.num_experts if num_experts is None else num_experts)

    @property
    def weight_bytes(self) -> float:
        """All weights on the device, bytes."""
        embeddings = self._head_bytes * (1 if self.tied_embeddings else 2)
        return self._layers_values(None) * self.weight_bytes_per_value + embeddings

    def step_weight_bytes(self, batch: int) -> float:
        """Weights that a decode step of `batch` sequences reads, bytes.

        All but the input embedding, of which it reads a row a sequence, and the experts that no sequence passes.
        """
        used = self._layers_values(self.experts.used_by(batch) if self.experts else None)
        return used * self.weight_bytes_per_value + self._head_bytes

    @property
    def token_weight_values(self) -> float:
        """Weights that one token is multiplied with: two operations each."""
        used = self._layers_values(self.experts.experts_per_token if self.experts else None)
        return used + self.vocab_size * self.hidden_size

    @property
    def has_fp8_weights(self) -> bool:
        """Whether the projections of the layers run with fp8 weights."""
        return self.weight_bytes_per_value == 1.0

    @property
    def _head_bytes(self) -> float:
        return self.vocab_size * self.hidden_size * max(2.0, self.weight_bytes_per_value)

    def _layers_values(self, num_experts: float | None) -> float:
        """Weights of all layers; those with experts are alike, and so are the others."""
        mixed = self.num_expert_layers
        first, last = (self.layer_weight_values(layer, num_experts) for layer in (0, self.num_layers - 1))
        return (self.num_layers - mixed) * first + mixed * last

    def shard(self, num_gpus: int) -> ModelSpec:
        """What each of `num_gpus` GPUs holds and computes: its heads, its part of each MLP and of the vocabulary.

        As in Megatron-LM (arXiv 1909.08053). What does not divide evenly is rounded up. Raises `SpecError` where the KV
        heads cannot be dealt out evenly.
        """
        if num_gpus == 1:
            return self
        if self.num_kv_heads % num_gpus:
            raise SpecError(
                f"machine.tensor_parallel = {num_gpus}: the {self.num_kv_heads} KV heads of {self.name} cannot be "
                "dealt out evenly to so many GPUs"
            )
        return self.with_fields(
            num_query_heads=self.num_query_heads // num_gpus,
            num_kv_heads=self.num_kv_heads // num_gpus,
            intermediate_size=_part(self.intermediate_size, num_gpus),
            vocab_size=_part(self.vocab_size, num_gpus),
            experts=None if self.experts is None else self.experts.shard(num_gpus).model_dump(),
        )


def _part(width: int, num_gpus: int) -> int:
    return -(-width // num_gpus)
