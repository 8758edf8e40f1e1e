"""What an operation does, in countable terms (shapes, bytes, pages). Knows nothing about how long it takes.

A quantity is a number known from the plan, or an `Amount`: a count that the data decides step by step. Records of
work are frozen and shared by all layers, so that a price can be computed once for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AmountName = Literal[
    "spec_heads",
    "spec_pages",
    "spec_sequences",
    "demand_heads",
    "demand_pages",
    "demand_sequences",
    "write_back_pages",
]


@dataclass(frozen=True, slots=True)
class Amount:
    """`scale` times a per-step, per-layer count of the traffic."""

    name: AmountName
    scale: float = 1.0


Quantity = float | Amount


@dataclass(frozen=True, slots=True)
class Gemm:
    """Dense product `[m, k] x [k, n]` with its weights, of `weight_bytes` each, read from device memory."""

    m: int
    n: int
    k: int
    weight_bytes: float = 2.0


@dataclass(frozen=True, slots=True)
class DecodeAttention:
    """One query token per sequence over `kv_tokens` keys and values in each KV head; `in_window`: all that the layer
    keeps of a sliding window."""

    batch: int
    kv_tokens: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    kv_bytes_per_value: float = 2.0
    in_window: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """One query token per sequence over `kv_tokens` vectors of latent attention, which all query heads share."""

    batch: int
    kv_tokens: int
    num_query_heads: int
    kv_rank: int
    rope_dim: int
    kv_bytes_per_value: float = 2.0

    @property
    def vector_dim(self) -> int:
        """Width of a cached vector, and of a query."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class LatentMap:
    """A product of each head's own: `rows` tokens, `[num_heads, rows, head_dim]` to or from `kv_rank`, in bf16."""

    rows: int
    num_heads: int
    head_dim: int
    kv_rank: int


@dataclass(frozen=True, slots=True)
class Experts:
    """Gated MLPs of which each token passes a few: `num_used` of them are read, for `rows` tokens each, in the mean."""

    num_used: float
    rows: float
    hidden_size: int
    intermediate_size: int
    weight_bytes: float = 2.0

    @property
    def weight_values(self) -> float:
        """Weights read: gate, up and down projection of every expert used."""
        return 3.0 * self.num_used * self.hidden_size * self.intermediate_size


@dataclass(frozen=True, slots=True)
class AllReduce:
    """`num_gpus` GPUs that share a layer add up what each has computed of it, `num_values` values."""

    num_gpus: int
    num_values: int


KernelName = Literal["elementwise", "hit_test", "score_pages", "select_pages", "resolve_pages", "linear_attention"]


@dataclass(frozen=True, slots=True)
class StreamKernel:
    """A kernel bound by the bytes it reads and writes in device memory, and those it stores to pinned host memory."""

    kernel: KernelName
    num_bytes: Quantity
    host_store_bytes: Quantity = 0.0


@dataclass(frozen=True, slots=True)
class IndexTokens:
    """A model's own indexer: its projections and small kernels, then `tokens` a sequence are scored and ranked.

    `cost` is the entry of a profile that prices its kind.
    """

    tokens: int
    num_bytes: Quantity
    cost: Literal["indexer", "block_indexer"] = "indexer"


@dataclass(frozen=True, slots=True)
class ZeroCopy:
    """`num_ctas` thread blocks read pinned host memory and write it to slots."""

    num_bytes: Quantity
    num_ctas: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy engine moves `pieces` runs of `piece_bytes`, one descriptor each."""

    direction: Literal["h2d", "d2h"]
    pieces: Quantity
    piece_bytes: float


@dataclass(frozen=True, slots=True)
class Submit:
    """The CPU fills and submits copy descriptors."""

    descriptors: Quantity


@dataclass(frozen=True, slots=True)
class HostGather:
    """CPU threads collect scattered pieces into a contiguous staging buffer."""

    pieces: Quantity
    piece_bytes: float
    num_threads: int


@dataclass(frozen=True, slots=True)
class BarWrite:
    """CPU threads write scattered pieces through the PCIe BAR into device memory."""

    pieces: Quantity
    piece_bytes: float
    num_threads: int


@dataclass(frozen=True, slots=True)
class Bookkeeping:
    """CPU threads look up residency and keep the least-recently-used order."""

    heads: Quantity
    pages: Quantity
    num_threads: int


HostActionName = Literal[
    "kernel_launch", "graph_launch", "stream_sync", "read_back", "thread_wake", "doorbell", "ready_flag"
]


@dataclass(frozen=True, slots=True)
class HostAction:
    """A fixed cost of the runtime, paid `count` times."""

    action: HostActionName
    count: int = 1


KernelWork = Gemm | Experts | DecodeAttention | LatentAttention | LatentMap | StreamKernel | IndexTokens

Work = KernelWork | AllReduce | ZeroCopy | Copy | Submit | HostGather | BarWrite | Bookkeeping | HostAction
