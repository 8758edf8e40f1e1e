"""What a transformer looks like to an offloading decoder: shapes and bytes. Knows nothing about weights or machines."""

from __future__ import annotations

import math
from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from clo.errors import SpecError
from clo.specs.base import Spec
from clo.specs.experts import ExpertsSpec
from clo.specs.indexer import IndexerSpec
from clo.specs.latent import LatentSpec
from clo.specs.linear import LinearSpec


class Projection(NamedTuple):
    """A linear layer: its name, its outputs and its inputs, and whether its weights are bf16 where others are not."""

    name: str
    n: int
    k: int
    wide: bool = False


class ModelSpec(Spec):
    """A Llama/Qwen/DeepSeek-style decoder: attention, gated MLP or experts, one KV cache per layer.

    With latent attention the vector that all query heads share is the one KV head, and `head_dim` its width.
    """

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
        description="bytes a weight of the layers takes, scales included (bf16: 2, fp8: 1, 4 bits: 0.5 to 0.625); "
        "embeddings, head and the maps of latent attention take 2 at least",
    )
    mlp_weight_bytes_per_value: float | None = Field(
        default=None, gt=0, description="of MLPs and shared experts, where that is another; none: as of the others"
    )
    kv_bytes_per_value: float = Field(default=2.0, gt=0, description="bytes a key or value element takes (bf16: 2)")
    experts: ExpertsSpec | None = Field(default=None, description="a mixture of experts; none: an MLP in every layer")
    latent: LatentSpec | None = Field(default=None, description="latent attention; none: keys and values in every head")
    indexer: IndexerSpec | None = Field(
        default=None, description="chooses the tokens that are attended to; none: attention is to all of them"
    )
    linear: LinearSpec | None = Field(
        default=None, description="linear attention in some layers; none: keys and values in all of them"
    )
    gated_attention: bool = Field(
        default=False, description="whether a gate, projected with the queries, scales what attention gives"
    )
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
        if self.experts is not None and self.experts.layers and self.experts.layers[-1] >= self.num_layers:
            raise ValueError(
                f"experts.layers: {self.experts.layers[-1]} must be less than num_layers = {self.num_layers}"
            )
        return self

    @model_validator(mode="after")
    def _one_vector(self) -> ModelSpec:
        if self.latent is None:
            return self
        if self.num_kv_heads != 1:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} must be 1: latent attention keeps one vector a token")
        if self.head_dim != self.latent.vector_dim:
            raise ValueError(
                f"head_dim = {self.head_dim} must be latent.kv_rank + latent.rope_dim = {self.latent.vector_dim}"
            )
        if self.windowed_layers or self.linear is not None or self.gated_attention:
            raise ValueError("latent excludes windowed_layers, linear and gated_attention: no such model is known here")
        return self

    @model_validator(mode="after")
    def _indexed(self) -> ModelSpec:
        if self.indexer is None:
            return self
        if self.latent is not None and not self.latent.query_rank:
            raise ValueError("indexer: with latent attention its queries are made from a query_rank: latent needs one")
        if self.latent is not None and (self.indexer.block_tokens > 1 or self.indexer.dense_layers):
            raise ValueError(
                "indexer.block_tokens and indexer.dense_layers: with latent attention single tokens are chosen in "
                "every layer: no other such model is known here"
            )
        if self.latent is None and self.indexer.num_heads != self.num_kv_heads:
            raise ValueError(
                f"indexer.num_heads = {self.indexer.num_heads} must be num_kv_heads = {self.num_kv_heads}: without "
                "latent attention every KV head chooses for itself"
            )
        if self.windowed_layers or self.linear is not None:
            raise ValueError("indexer excludes windowed_layers and linear: no such model is known here")
        if shared := [layer for layer in self.indexer.shared_layers if layer >= self.num_layers]:
            raise ValueError(f"indexer.shared_layers: {shared[0]} must be less than num_layers = {self.num_layers}")
        if self.indexer.dense_layers >= self.num_layers:
            raise ValueError(
                f"indexer.dense_layers = {self.indexer.dense_layers} must be less than num_layers = {self.num_layers}"
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

    @model_validator(mode="after")
    def _hybrid(self) -> ModelSpec:
        if self.linear is None:
            return self
        if self.windowed_layers:
            raise ValueError("windowed_layers and linear exclude each other: no such model is known here")
        if self.linear.layers[-1] >= self.num_layers:
            raise ValueError(
                f"linear.layers: {self.linear.layers[-1]} must be less than num_layers = {self.num_layers}"
            )
        if self.num_linear_layers == self.num_layers:
            raise ValueError("linear.layers must leave a layer with keys and values")
        return self

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def head_token_values(self) -> int:
        """Key and value of one token in one KV head of one layer, or the vector that serves as both."""
        return (2 if self.latent is None else 1) * self.head_dim

    @property
    def head_token_bytes(self) -> float:
        """The same as computed, bytes."""
        return self.head_token_values * self.kv_bytes_per_value

    @property
    def layer_token_bytes(self) -> float:
        """Key and value of one token in one layer, bytes."""
        return self.head_token_bytes * self.num_kv_heads

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one more token in all layers that keep the whole context, bytes (Llama-3-8B: 131,072)."""
        return self.layer_token_bytes * (self.num_layers - len(self.windowed_layers) - self.num_linear_layers)

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers that keep keys and values of the whole context, ascending: all but windowed and linear ones."""
        linear = () if self.linear is None else self.linear.layers
        return tuple(sorted(set(range(self.num_layers)).difference(self.windowed_layers, linear)))

    @property
    def linear_flags(self) -> tuple[bool, ...]:
        """Of each layer, whether it has linear attention."""
        return tuple(self.linear_in(layer) is not None for layer in range(self.num_layers))

    @property
    def num_linear_layers(self) -> int:
        """Layers with a state in place of keys and values."""
        return 0 if self.linear is None else len(self.linear.layers)

    def linear_in(self, layer: int) -> LinearSpec | None:
        """The linear attention of a layer, if that is what it has."""
        return self.linear if self.linear is not None and layer in self.linear.layers else None

    @property
    def state_bytes(self) -> float:
        """What all layers with linear attention keep of a sequence, whatever its length, bytes."""
        return 0.0 if self.linear is None else self.num_linear_layers * self.linear.state_bytes

    def attended_at_most(self, layer: int, context_tokens: int) -> int:
        """Tokens that a layer keeps and attends to in full attention: all, those in its window, or none."""
        if self.linear_in(layer) is not None:
            return 0
        if self.window_tokens is None or layer not in self.windowed_layers:
            return context_tokens
        return min(context_tokens, self.window_tokens)

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection, with the gate if there is one."""
        queries = (2 if self.gated_attention else 1) * self.num_query_heads
        return (queries + 2 * self.num_kv_heads) * self.head_dim

    @property
    def query_width(self) -> int:
        """All heads' queries as they are projected."""
        return self.num_query_heads * (self.head_dim if self.latent is None else self.latent.query_dim)

    def projections_in(self, layer: int, predicted_layers: int = 0) -> tuple[Projection, ...]:
        """Linear layers from the hidden state to what a layer's attention reads, gates too.

        With those that give the queries of `predicted_layers` later layers.
        """
        linear, hidden = self.linear_in(layer), self.hidden_size
        if linear is None:
            return self.projections(predicted_layers)
        width = linear.conv_width + linear.value_width
        return (
            Projection("linear_proj", predicted_layers * self.query_width + width, hidden),
            Projection("decay_proj", 2 * linear.num_value_heads, hidden, wide=True),
        )

    def projections(self, predicted_layers: int = 0) -> tuple[Projection, ...]:
        """The same in a layer with keys and values."""
        hidden, latent, queries = self.hidden_size, self.latent, (1 + predicted_layers) * self.query_width
        if latent is None:
            return (Projection("qkv_proj", queries + self.qkv_width - self.query_width, hidden),)
        if not latent.query_rank:
            return (Projection("latent_proj", queries + latent.vector_dim, hidden),)
        ranks = (1 + predicted_layers) * latent.query_rank
        return (
            Projection("latent_proj", ranks + latent.vector_dim, hidden),
            Projection("query_proj", queries, latent.query_rank),
        )

    def indexer_in(self, layer: int) -> IndexerSpec | None:
        """The indexer of a layer, if it has one of its own."""
        return self.indexer if self.indexer is not None and self.indexer.chooses_in(layer) else None

    @property
    def num_indexers(self) -> int:
        """Layers with an indexer of their own."""
        if self.indexer is None:
            return 0
        return self.num_layers - self.indexer.dense_layers - len(self.indexer.shared_layers)

    @property
    def indexer_projections(self) -> tuple[Projection, ...]:
        """Linear layers of one indexer: its queries, the key of a token (with latent attention, weights of heads)."""
        if self.indexer is None:
            return ()
        if self.latent is None:
            return (Projection("index_proj", self.indexer.query_width + self.indexer.head_dim, self.hidden_size),)
        return (
            Projection("index_query_proj", self.indexer.query_width, self.latent.query_rank),
            Projection("index_key_proj", self.indexer.head_dim + self.indexer.num_heads, self.hidden_size),
        )

    @property
    def out_projection(self) -> Projection:
        """Linear layer from what attention gives back to the hidden state."""
        width = self.head_dim if self.latent is None else self.latent.value_dim
        return Projection("out_proj", self.hidden_size, self.num_query_heads * width)

    def out_projection_in(self, layer: int) -> Projection:
        """The same of any layer."""
        linear = self.linear_in(layer)
        return self.out_projection if linear is None else Projection("out_proj", self.hidden_size, linear.value_width)

    @property
    def attention_flops(self) -> int:
        """Arithmetic of one query head for one cached token in a decode step: its score, its part of the sum."""
        return 4 * self.head_dim if self.latent is None else 2 * (self.head_dim + self.latent.kv_rank)

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts."""
        if self.experts is None:
            return 0
        return len(self.experts.layers) or self.num_layers - self.experts.dense_layers

    def experts_in(self, layer: int) -> ExpertsSpec | None:
        """The experts of a layer, if it has any."""
        return self.experts if self.experts is not None and self.experts.are_in(layer) else None

    def mlp_width(self, layer: int) -> int:
        """Width of the gated MLP that every token passes in a layer: where there are experts, of the shared one."""
        return self._mlp_width(self.experts_in(layer))

    def _mlp_width(self, experts: ExpertsSpec | None) -> int:
        return self.intermediate_size if experts is None else experts.shared_intermediate_size

    def attention_weight_values(self, layer: int) -> int:
        """Weights of a layer before and after its attention, but for those of an indexer."""
        products = (*self.projections_in(layer), self.out_projection_in(layer))
        return sum(each.n * each.k for each in products) + self._map_values

    @property
    def all_attention_weight_values(self) -> int:
        """The same of all layers, with all indexers."""
        indexers = self.num_indexers * sum(each.n * each.k for each in self.indexer_projections)
        linear = () if self.linear is None else self.linear.layers
        others = sum(each.n * each.k for each in (*self.projections(), self.out_projection)) + self._map_values
        return (self.num_layers - len(linear)) * others + sum(map(self.attention_weight_values, linear)) + indexers

    def layer_weight_values(self, layer: int, num_experts: float | None = None) -> float:
        """Weights of a layer, or of it with `num_experts` of its experts only (norms are negligible), values.

        All but those of an indexer.
        """
        return self.attention_weight_values(layer) + sum(self._mlp_values(self.experts_in(layer), num_experts))

    @property
    def weight_bytes(self) -> float:
        """All weights on the device, bytes."""
        embeddings = self._head_bytes * (1 if self.tied_embeddings else 2)
        return self._layers_bytes(None) + embeddings

    def step_weight_bytes(self, batch: int) -> float:
        """Weights that a decode step of `batch` sequences reads, bytes.

        All but the input embedding, of which it reads a row a sequence, and the experts that no sequence passes.
        """
        return self._layers_bytes(self.experts.used_by(batch) if self.experts else None) + self._head_bytes

    @property
    def token_weight_values(self) -> float:
        """Weights that one token is multiplied with: two operations each."""
        used = self._layers_values(self.experts.experts_per_token if self.experts else None)
        return used + self.vocab_size * self.hidden_size

    @property
    def mlp_weight_bytes(self) -> float:
        """Bytes of a weight of MLPs and shared experts."""
        return self.mlp_weight_bytes_per_value or self.weight_bytes_per_value

    @property
    def expert_weight_bytes(self) -> float:
        """Bytes of a weight of the experts that a router chooses."""
        return (self.experts and self.experts.weight_bytes_per_value) or self.mlp_weight_bytes

    @property
    def wide_weight_bytes(self) -> float:
        """Of a weight that stays bf16 where others are narrower: embeddings, head, router, maps of latent attention."""
        return max(2.0, self.weight_bytes_per_value)

    def product_weight_bytes(self, product: Projection) -> float:
        """Of a projection around attention."""
        return self.wide_weight_bytes if product.wide else self.weight_bytes_per_value

    @property
    def _head_bytes(self) -> float:
        return self.vocab_size * self.hidden_size * self.wide_weight_bytes

    @property
    def _map_values(self) -> int:
        return 0 if self.latent is None else self.latent.map_values(self.num_query_heads)

    def _layers_bytes(self, num_experts: float | None) -> float:
        wider = self.num_layers * self._map_values * (self.wide_weight_bytes - self.weight_bytes_per_value)
        mlps, experts = self._mlps_values(num_experts)
        narrow = mlps * self.mlp_weight_bytes + experts * self.expert_weight_bytes
        return self.all_attention_weight_values * self.weight_bytes_per_value + wider + narrow

    def _layers_values(self, num_experts: float | None) -> float:
        return self.all_attention_weight_values + sum(self._mlps_values(num_experts))

    def _mlps_values(self, num_experts: float | None) -> tuple[float, float]:
        """Of all layers: of MLPs, shared experts and routers, and of experts."""
        mixed = self.num_expert_layers
        dense, own = (self._mlp_values(experts, num_experts) for experts in (None, self.experts))
        return (self.num_layers - mixed) * dense[0] + mixed * own[0], mixed * own[1]

    def _mlp_values(self, experts: ExpertsSpec | None, num_experts: float | None) -> tuple[float, float]:
        mlp = 3 * self.hidden_size * self._mlp_width(experts)
        if experts is None:
            return mlp, 0.0
        router, one = self.hidden_size * experts.num_experts, 3 * self.hidden_size * experts.intermediate_size
        return mlp + router, one * (experts.num_experts if num_experts is None else num_experts)

    def kv_copies(self, parts: int) -> int:
        """How many of `parts` GPUs keep the same KV head: some, where there are fewer heads than GPUs."""
        return parts // self.num_kv_heads if self.latent is None and parts % self.num_kv_heads == 0 else 1

    def shard(self, num_gpus: int, *, whole_attention: bool = False) -> ModelSpec:
        """What each of `num_gpus` GPUs holds and computes: its heads, its part of each MLP and of the vocabulary.

        With `whole_attention` all heads, of the sequences that are its own.
        As in Megatron-LM (arXiv 1909.08053). What does not divide evenly is rounded up. KV heads that are fewer than
        the GPUs are kept by several of them; the vectors of latent attention, and what makes them, by each. Raises
        `SpecError` where heads cannot be dealt out evenly.
        """
        if num_gpus == 1:
            return self
        parts = 1 if whole_attention else num_gpus
        copies = self.kv_copies(parts)
        heads = {} if self.latent is not None else {"KV": self.num_kv_heads * copies}
        heads["query"] = self.num_query_heads
        if self.linear is not None:
            heads["linear attention's key"] = self.linear.num_key_heads
        for kind, dealt in heads.items():
            if dealt % parts:
                raise SpecError(
                    f"machine.tensor_parallel = {num_gpus}: the {dealt} {kind} heads of {self.name} cannot be "
                    "dealt out evenly to so many GPUs: deal out sequences instead (machine.attention_by = sequences)"
                )
        kv_heads = self.num_kv_heads * copies // parts if self.latent is None else 1
        own = {} if self.indexer is None or self.latent is not None else {"indexer": self.indexer.shard(kv_heads)}
        return self.with_fields(
            num_query_heads=self.num_query_heads // parts,
            num_kv_heads=kv_heads,
            intermediate_size=math.ceil(self.intermediate_size / num_gpus),
            vocab_size=math.ceil(self.vocab_size / num_gpus),
            experts=None if self.experts is None else self.experts.shard(num_gpus).model_dump(),
            linear=None if self.linear is None else self.linear.shard(parts).model_dump(),
            **{name: each.model_dump() for name, each in own.items()},
        )
