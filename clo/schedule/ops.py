"""The operations of one decode step with their shapes, built from a plan. Knows nothing about their order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from clo.placement import own_indexer
from clo.plan import DecodePlan
from clo.schedule.machine import Op, Part
from clo.schedule.work import (
    AllReduce,
    Amount,
    AmountName,
    BarWrite,
    Bookkeeping,
    Copy,
    DecodeAttention,
    Experts,
    Gemm,
    HostAction,
    HostActionName,
    HostGather,
    IndexTokens,
    LatentAttention,
    LatentMap,
    StreamKernel,
    Submit,
    Work,
    ZeroCopy,
)
from clo.specs import Attend, ExpertsSpec, LinearSpec, ModelSpec, Projection, Sync

PREFETCH_MARK = "prefetch."
"""Begins the names of operations that serve a prediction."""

INDEX_SCORE_BYTES = 4.0
"""A page score is a float32."""


class Stage(StrEnum):
    """Whether an operation serves what is predicted or what the real query asks for."""

    PREFETCH = "prefetch"
    DEMAND = "demand"

    @property
    def heads(self) -> AmountName:
        """Count of KV heads (times sequences) that select anew."""
        return "spec_heads" if self is Stage.PREFETCH else "demand_heads"

    @property
    def sequences(self) -> AmountName:
        """Count of sequences in which a KV head selects anew."""
        return "spec_sequences" if self is Stage.PREFETCH else "demand_sequences"

    @property
    def pages(self) -> AmountName:
        """Count of pages fetched."""
        return "spec_pages" if self is Stage.PREFETCH else "demand_pages"

    def op_name(self, name: str) -> str:
        """Prefetch operations are told apart from on-demand ones by a prefix."""
        return f"{PREFETCH_MARK}{name}" if self is Stage.PREFETCH else name


def price_name(op: Op) -> str:
    """What a price list calls an operation: fetching ahead costs what fetching costs, a launch is a launch."""
    if isinstance(op.work, HostAction):
        return op.work.action
    if isinstance(op.work, Submit):
        return "submit"
    return op.name.removeprefix(PREFETCH_MARK)


def experts_work(model: ModelSpec, experts: ExpertsSpec, tokens: Any) -> Experts:
    """What the experts of a layer do for `tokens` tokens, routed evenly and independently."""
    used = experts.used_by(tokens)
    rows = tokens * experts.experts_per_token / used
    return Experts(used, rows, model.hidden_size, experts.intermediate_size, model.expert_weight_bytes)


@dataclass(frozen=True, slots=True)
class StepOps:
    """Builds the operations of one plan. Of attention they are for this GPU's sequences, of the rest for the batch."""

    plan: DecodePlan

    def hidden_norm(self, name: str, layer: int) -> Op:
        """Fused residual add and RMSNorm: reads the hidden state and the residual, writes both."""
        hidden_bytes = self.plan.sequences * self.plan.model.hidden_size * 2.0
        return Op(name, layer, Part.MODEL, StreamKernel("elementwise", 4 * hidden_bytes))

    def to_queries(self, layer: int, predicted_layers: int) -> tuple[Op, ...]:
        """Projections of this layer, and of the queries of the layers it predicts (norm weights folded in).

        With latent attention also the norms of the low ranks, and the map of the queries into the vectors' space.
        """
        model, sequences = self.plan.model, self.plan.sequences
        first, *others = (self._projection(each, layer) for each in model.projections_in(layer, predicted_layers))
        if (latent := model.latent) is None:
            return (first, *others)
        rows = sequences * (1 + predicted_layers)
        norms = StreamKernel("elementwise", 2 * 2.0 * (rows * latent.query_rank + sequences * latent.kv_rank))
        norm = Op("latent_norm", layer, Part.MODEL, norms)
        # a predicted layer maps its queries with weights of its own: as more heads, not as more rows of the same
        heads = model.num_query_heads * (1 + predicted_layers)
        return (first, norm, *others, self._map("map_queries", layer, heads, latent.nope_dim))

    def to_hidden(self, layer: int) -> tuple[Op, ...]:
        """Attention output projection, after the gate of what attention gave.

        With latent attention after the map from the vectors' space to the values'.
        """
        model = self.plan.model
        out = self._projection(model.out_projection_in(layer), layer)
        if model.gated_attention or model.linear_in(layer) is not None:
            return (self._output_gate(layer), out)
        if model.latent is None:
            return (out,)
        return (self._map("map_outputs", layer, model.num_query_heads, model.latent.value_dim), out)

    def append_kv(self, layer: int) -> Op:
        """Rotary embedding, the new token into the window, the index entry of a page that fills up.

        Where the GPU moves pages by itself, the kernel also stores the page that leaves the window to the host.
        """
        model, sequences = self.plan.model, self.plan.sequences
        indexer = model.indexer_in(layer)
        keys = 2 * model.layer_token_bytes + (2 * indexer.key_bytes if indexer else 0.0)
        num_bytes = sequences * (2 * model.query_width * 2.0 + keys)
        stores = self.plan.is_sparse(layer) and self.plan.design.offloads and not self.copies_back
        leaving = Amount("write_back_pages", self.plan.page_bytes) if stores else 0.0
        return Op("append_kv", layer, Part.MODEL, StreamKernel("elementwise", num_bytes, leaving))

    def _output_gate(self, layer: int) -> Op:
        """What attention gave times its gate (in linear attention also normed): reads both, writes one."""
        width = self.plan.model.out_projection_in(layer).k
        gated = StreamKernel("elementwise", 3 * self.plan.sequences * width * 2.0)
        return Op("output_gate", layer, Part.MODEL, gated)

    def linear_attention(self, layer: int, linear: LinearSpec) -> Op:
        """The convolution over the last tokens, and every head's state read, changed and written."""
        work = StreamKernel("linear_attention", self.plan.sequences * linear.step_bytes)
        return Op("linear_attention", layer, Part.ATTENTION, work)

    @property
    def copies_back(self) -> bool:
        """Whether pages that leave the window go to the host by a copy engine, not by a kernel's stores."""
        design = self.plan.design
        return design.offloads and design.cpu_moves and design.sync is not Sync.GRAPH

    def write_back(self, layer: int) -> Op:
        """Pages that leave the recent window go to the host."""
        return Op("write_back", layer, Part.TRANSFER, Copy("d2h", Amount("write_back_pages"), self.plan.page_bytes))

    def hit_test(self, stage: Stage, layer: int) -> Op:
        """Cosine of every query with its head's anchor, folded per KV head."""
        model, sequences = self.plan.model, self.plan.sequences
        num_bytes = 2 * sequences * model.num_query_heads * model.head_dim * 2.0
        return Op(stage.op_name("hit_test"), layer, Part.SELECTION, StreamKernel("hit_test", num_bytes))

    def score_pages(self, stage: Stage, layer: int) -> Op:
        """Scans the selector's index of the heads that select."""
        work = StreamKernel("score_pages", Amount(stage.heads, self.plan.index_bytes_per_head))
        return Op(stage.op_name("score_pages"), layer, Part.SELECTION, work)

    def select_pages(self, stage: Stage, layer: int) -> Op:
        """The budget's best pages of the heads that select."""
        work = StreamKernel("select_pages", Amount(stage.heads, self.plan.num_pages * INDEX_SCORE_BYTES))
        return Op(stage.op_name("select_pages"), layer, Part.SELECTION, work)

    def index_tokens(self, stage: Stage, layer: int) -> Op:
        """The model's own indexer, projections and all: in the sequences that select, the best of all tokens."""
        model, tokens = self.plan.model, self.plan.workload.context_tokens
        keys = Amount(stage.sequences, tokens * own_indexer(model).key_bytes)
        work = IndexTokens(tokens, keys, "indexer" if model.latent is not None else "block_indexer")
        return Op(stage.op_name("index_tokens"), layer, Part.SELECTION, work)

    def share_pages(self, stage: Stage, layer: int) -> Op:
        """The list of pages that the last layer with an indexer chose, taken over as it is (32-bit numbers)."""
        work = StreamKernel("elementwise", Amount(stage.heads, 2 * 4.0 * self.plan.budget_pages))
        return Op(stage.op_name("share_pages"), layer, Part.SELECTION, work)

    def resolve_pages(self, stage: Stage, layer: int) -> Op:
        """Page table look-up of the selection, eviction order of the slots."""
        entries = 4.0 * (self.plan.budget_pages + self.plan.slot_pages)
        work = StreamKernel("resolve_pages", Amount(stage.heads, entries))
        return Op(stage.op_name("resolve_pages"), layer, Part.SELECTION, work)

    def lru_update(self, stage: Stage, layer: int) -> Op:
        """The same on CPU threads."""
        work = Bookkeeping(
            Amount(stage.heads),
            Amount(stage.heads, self.plan.budget_pages),
            self.plan.design.transfer_threads,
        )
        return Op(stage.op_name("lru_update"), layer, Part.SELECTION, work)

    def gather_pages(self, stage: Stage, layer: int) -> Op:
        """GPU zero-copy: thread blocks read the missing pages from pinned host memory."""
        work = ZeroCopy(Amount(stage.pages, self.plan.page_bytes), self.plan.design.num_ctas)
        return Op(stage.op_name("gather_pages"), layer, Part.TRANSFER, work)

    def copy_pages(self, stage: Stage, layer: int) -> Op:
        """One descriptor a page; a streamed layer is one run per sequence."""
        if self.plan.design.attend is Attend.FULL:
            heads = self.plan.model.num_kv_heads - self.plan.pinned_heads_per_layer
            run = self.plan.workload.context_tokens * heads * self.plan.model.head_token_bytes
            work = Copy("h2d", float(self.plan.sequences), run)
        else:
            work = Copy("h2d", Amount(stage.pages), self.plan.page_bytes)
        return Op(stage.op_name("copy_pages"), layer, Part.TRANSFER, work)

    def host_gather(self, stage: Stage, layer: int) -> Op:
        """CPU threads collect the missing pages in a pinned staging buffer."""
        work = HostGather(Amount(stage.pages), self.plan.page_bytes, self.plan.design.transfer_threads)
        return Op(stage.op_name("host_gather"), layer, Part.TRANSFER, work)

    def copy_staged(self, stage: Stage, layer: int) -> Op:
        """The staging buffer goes over the link in runs of about a MiB, large enough for the full rate."""
        pages_per_run = max(1.0, 2**20 / self.plan.page_bytes)
        work = Copy("h2d", Amount(stage.pages, 1 / pages_per_run), pages_per_run * self.plan.page_bytes)
        return Op(stage.op_name("copy_staged"), layer, Part.TRANSFER, work)

    def bar_write(self, stage: Stage, layer: int) -> Op:
        """CPU zero-copy: threads write the missing pages straight into device memory."""
        work = BarWrite(Amount(stage.pages), self.plan.page_bytes, self.plan.design.transfer_threads)
        return Op(stage.op_name("bar_write"), layer, Part.TRANSFER, work)

    def attention(self, layer: int) -> Op:
        """Decode attention of the heads whose pages are fetched, over sinks, window and slots."""
        heads = self.plan.model.num_kv_heads - self.plan.pinned_heads_per_layer
        return self._attention("attention", layer, self.plan.attended_tokens, heads, self.plan.attended_bytes_per_value)

    def pinned_attention(self, layer: int) -> Op:
        """Full attention of the pinned heads."""
        heads = self.plan.pinned_heads_per_layer
        return self._attention("pinned_attention", layer, self.plan.workload.context_tokens, heads)

    def dense_attention(self, layer: int) -> Op:
        """Full attention of every head over KV that is wholly on the device, in a layer's window if it has one."""
        model = self.plan.model
        tokens = model.attended_at_most(layer, self.plan.workload.context_tokens)
        return self._attention("attention", layer, tokens, model.num_kv_heads, in_window=layer in model.windowed_layers)

    def gate_up_proj(self, layer: int) -> Op:
        """Fused gate and up projection of the MLP, or of the shared expert."""
        model = self.plan.model
        return self._gemm("gate_up_proj", layer, 2 * model.mlp_width(layer), model.hidden_size, model.mlp_weight_bytes)

    def activation(self, layer: int) -> Op:
        """Gated activation."""
        num_bytes = 3 * self.plan.workload.batch * self.plan.model.mlp_width(layer) * 2.0
        return Op("activation", layer, Part.MODEL, StreamKernel("elementwise", num_bytes))

    def down_proj(self, layer: int) -> Op:
        """Down projection of the MLP, or of the shared expert."""
        model = self.plan.model
        return self._gemm("down_proj", layer, model.hidden_size, model.mlp_width(layer), model.mlp_weight_bytes)

    def router_proj(self, layer: int, experts: ExpertsSpec) -> Op:
        """How well every expert suits every token."""
        model = self.plan.model
        return self._gemm("router_proj", layer, experts.num_experts, model.hidden_size, model.wide_weight_bytes)

    def route(self, layer: int, experts: ExpertsSpec) -> Op:
        """The best experts of every token and their weights (float32 scores read twice)."""
        num_bytes = self.plan.workload.batch * experts.num_experts * 8.0
        return Op("route", layer, Part.MODEL, StreamKernel("elementwise", num_bytes))

    def experts(self, layer: int, experts: ExpertsSpec) -> Op:
        """The chosen experts of every token, and their sum."""
        return Op("experts", layer, Part.MODEL, experts_work(self.plan.model, experts, self.plan.workload.batch))

    def lm_head(self) -> Op:
        """Vocabulary projection after the last layer."""
        model = self.plan.model
        return self._gemm("lm_head", self.last_layer, model.vocab_size, model.hidden_size, model.wide_weight_bytes)

    def sample(self) -> Op:
        """Sampling over the logits (float32 read twice)."""
        num_bytes = self.plan.workload.batch * self.plan.model.vocab_size * 8.0
        return Op("sample", self.last_layer, Part.MODEL, StreamKernel("elementwise", num_bytes))

    def all_reduce(self, layer: int, num_values: int) -> Op:
        """GPUs that share the model add up their parts, `num_values` for each sequence of the batch.

        Where each attends for sequences of its own, it also stands for handing out and collecting those.
        """
        work = AllReduce(self.plan.machine.tensor_parallel, self.plan.workload.batch * num_values)
        return Op("all_reduce", layer, Part.EXCHANGE, work)

    def host_action(self, action: HostActionName, layer: int) -> Op:
        """A fixed runtime cost."""
        return Op(action, layer, Part.RUNTIME, HostAction(action))

    @property
    def shares_model(self) -> bool:
        """Whether several GPUs compute a part of every layer each."""
        return self.plan.machine.tensor_parallel > 1

    @property
    def deals_sequences(self) -> bool:
        """Whether they deal out attention by sequences, not by heads."""
        return self.plan.machine.deals_sequences

    @property
    def last_layer(self) -> int:
        """What follows the layers is counted with the last of them."""
        return self.plan.model.num_layers - 1

    def _gemm(self, name: str, layer: int, n: int, k: int, weight_bytes: float) -> Op:
        return Op(name, layer, Part.MODEL, Gemm(self.plan.workload.batch, n, k, weight_bytes))

    def _projection(self, product: Projection, layer: int) -> Op:
        weight_bytes = self.plan.model.product_weight_bytes(product)
        return Op(product.name, layer, Part.MODEL, Gemm(self.plan.sequences, product.n, product.k, weight_bytes))

    def _map(self, name: str, layer: int, num_heads: int, head_dim: int) -> Op:
        latent = self.plan.model.latent
        assert latent is not None
        return Op(name, layer, Part.MODEL, LatentMap(self.plan.sequences, num_heads, head_dim, latent.kv_rank))

    def _attention(
        self,
        name: str,
        layer: int,
        kv_tokens: int,
        kv_heads: int,
        bytes_per_value: float | None = None,
        *,
        in_window: bool = False,
    ) -> Op:
        model, sequences = self.plan.model, self.plan.sequences
        heads, latent, width = kv_heads * model.group_size, model.latent, bytes_per_value or model.kv_bytes_per_value
        work: Work
        if latent is None:
            work = DecodeAttention(sequences, kv_tokens, heads, kv_heads, model.head_dim, width, in_window)
        else:
            work = LatentAttention(sequences, kv_tokens, heads, latent.kv_rank, latent.rope_dim, width)
        return Op(name, layer, Part.ATTENTION, work)
