"""What operations cost on one machine, and how that is known. Knows nothing about schedules.

A profile is a versioned JSON file. Every cost carries its source, so that a report can say how much of a result rests
on measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationError, field_validator

from clo.errors import ProfileError
from clo.files import read_json
from clo.kernel_tables import (
    AllReduceTable,
    DecodeAttentionTable,
    ExpertsTable,
    GemmTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo.specs.base import Spec, check_version, explain
from clo.specs.overrides import apply

SCHEMA_VERSION = 1


class Source(StrEnum):
    """How a cost is known, best first."""

    MEASURED = "measured"
    AICONFIGURATOR = "aiconfigurator"
    LITERATURE = "literature"
    ASSUMED = "assumed"

    @property
    def is_measured(self) -> bool:
        """Whether somebody timed it on the kind of machine the profile is for."""
        return self in (Source.MEASURED, Source.AICONFIGURATOR)


class Cost(Spec):
    """Where a cost comes from."""

    source: Source
    note: str = ""
    date: str = ""
    samples: NonNegativeInt = 0
    spread: NonNegativeFloat = Field(default=0.0, description="relative standard deviation of the samples")


class FixedCost(Cost):
    """The same every time."""

    seconds: NonNegativeFloat


class StreamCost(Cost):
    """A bandwidth-bound kernel: `latency_s + bytes / (efficiency * HBM bandwidth)`."""

    latency_s: NonNegativeFloat
    efficiency: PositiveFloat = Field(le=1.0, description="share of the datasheet HBM bandwidth")


class ArithmeticCost(Cost):
    """A kernel bound by arithmetic: `flops / (efficiency * datasheet rate)`."""

    efficiency: PositiveFloat = Field(le=1.0, description="share of the datasheet bf16 rate")


class IndexerCost(Cost):
    """A model's own indexer in a decode step: `latency_s + tokens * per_token_s + bytes / (efficiency * bandwidth)`.

    `tokens` are those of one sequence, which are ranked one after the other, and `bytes` the keys of all sequences;
    `latency_s` is that of everything around: projections and small kernels.
    """

    latency_s: NonNegativeFloat
    per_token_s: NonNegativeFloat
    efficiency: PositiveFloat = Field(le=1.0, description="share of the datasheet HBM bandwidth")


PREFILL_ATTENTION = ArithmeticCost(
    source=Source.LITERATURE,
    note="causal prefill attention: FlashAttention-2 reports 50 to 73% on A100, FlashAttention-3 up to 75% on H100",
    efficiency=0.6,
    spread=0.12,
)
"""Where nobody measured it. Its spread is that of shares of 0.5 to 0.75, all as likely."""


PREFILL_INDEXER = ArithmeticCost(
    source=Source.ASSUMED, note="scores of an indexer, as on H200: its fp8 products count as bf16 ones", efficiency=0.87
)
PREFILL_CHOSEN = ArithmeticCost(
    source=Source.ASSUMED, note="latent attention of a prompt to what an indexer chose, as on H200", efficiency=0.58
)
PREFILL_BLOCK_INDEXER = ArithmeticCost(
    source=Source.ASSUMED, note="scores of an indexer of blocks, as on H200", efficiency=0.15
)
PREFILL_BLOCK_ATTENTION = ArithmeticCost(
    source=Source.ASSUMED, note="attention of a prompt to blocks that an indexer chose, as on H200", efficiency=0.15
)
INDEXER = IndexerCost(
    source=Source.ASSUMED,
    note="an indexer in a decode step, as on H200",
    latency_s=4.1e-5,
    per_token_s=2.6e-11,
    efficiency=0.71,
)
BLOCK_INDEXER = IndexerCost(
    source=Source.ASSUMED,
    note="an indexer of blocks in a decode step, as on H200",
    latency_s=1e-5,
    per_token_s=1.2e-11,
    efficiency=0.85,
)


class ScanCost(Cost):
    """Linear attention of a prompt: `latency_s + tokens * (per_token_s + heads * per_head_token_s)`.

    Tokens of a sequence come one after the other, a block at a time, in all `heads` (of values) beside each other.
    """

    latency_s: NonNegativeFloat
    per_token_s: NonNegativeFloat
    per_head_token_s: NonNegativeFloat

    def seconds(self, tokens: Any, heads: int) -> Any:
        """Of one layer."""
        return self.latency_s + tokens * (self.per_token_s + heads * self.per_head_token_s)


LINEAR_ATTENTION = StreamCost(
    source=Source.ASSUMED, note="linear attention in a decode step, as on H200", latency_s=6.2e-6, efficiency=0.85
)
PREFILL_LINEAR_ATTENTION = ScanCost(
    source=Source.ASSUMED,
    note="linear attention of a prompt, as Triton kernels take on H100",
    latency_s=3.4e-5,
    per_token_s=2.2e-8,
    per_head_token_s=2.5e-9,
)


class CopyCost(Cost):
    """A copy engine: `latency_s + pieces * piece_bytes / min(link, rate(piece_bytes))`.

    `rate` is piecewise linear in log(piece size) and constant outside the table.
    """

    latency_s: NonNegativeFloat
    piece_bytes: list[PositiveFloat]
    bytes_per_s: list[PositiveFloat]

    @field_validator("bytes_per_s")
    @classmethod
    def _as_long(cls, value: list[float], info: Any) -> list[float]:
        sizes = info.data.get("piece_bytes", [])
        if len(value) != len(sizes) or sorted(sizes) != sizes or not sizes:
            raise ValueError("must have one rate for each of the ascending piece_bytes")
        return value

    def rate(self, piece_bytes: float) -> float:
        """Bytes/s when every descriptor moves `piece_bytes`: of the nearest size that is known, beyond them."""
        size = max(piece_bytes, self.piece_bytes[0])
        return float(np.interp(np.log(size), np.log(self.piece_bytes), self.bytes_per_s))


class ZeroCopyCost(Cost):
    """A kernel over pinned host memory: `min(link, most, ctas * in_flight / round_trip)` after `latency_s`."""

    latency_s: NonNegativeFloat
    in_flight_bytes_per_cta: PositiveFloat
    round_trip_s: PositiveFloat
    most_bytes_per_s: PositiveFloat | None = Field(
        default=None, description="what kernels of this GPU can read at all, however fast the link; none: not known"
    )

    def rate(self, num_ctas: int) -> float:
        """Bytes/s that `num_ctas` thread blocks can read from the host over a link that is fast enough."""
        in_flight = num_ctas * self.in_flight_bytes_per_cta / self.round_trip_s
        return in_flight if self.most_bytes_per_s is None else min(self.most_bytes_per_s, in_flight)


class ThreadCost(Cost):
    """CPU threads moving scattered pieces: each pays `per_piece_s` a piece and moves `bytes_per_s_per_thread`."""

    per_piece_s: NonNegativeFloat
    bytes_per_s_per_thread: PositiveFloat
    link_share: PositiveFloat = Field(default=1.0, le=1.0, description="share of the link that CPU writes can reach")


class BookkeepingCost(Cost):
    """CPU threads keeping a cache's order."""

    per_head_s: NonNegativeFloat
    per_page_s: NonNegativeFloat


class SubmitCost(Cost):
    """The CPU submitting copies: one call, plus one descriptor per piece."""

    per_call_s: NonNegativeFloat
    per_descriptor_s: NonNegativeFloat


class InterferenceCost(Cost):
    """How much a kernel slows beside transfers, beyond shared bandwidth.

    `per_sm_share`: relative slow-down when a zero-copy kernel holds all SMs, proportional below; `dma`: beside DMA.
    """

    per_sm_share: NonNegativeFloat = Field(lt=1.0)
    dma: NonNegativeFloat = Field(lt=1.0)


class Profile(Spec):
    """All costs of one machine. Seconds and bytes; see each cost's `source`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    machine: str
    date: str
    note: str = ""

    gemm: GemmTable
    gemm_fp8: GemmTable | None = None
    gemm_4bit: GemmTable | None = None
    decode_attention: DecodeAttentionTable
    decode_attention_fp8: DecodeAttentionTable | None = None
    all_reduce: AllReduceTable | None = None
    experts: ExpertsTable | None = None
    experts_fp8: ExpertsTable | None = None
    experts_4bit: ExpertsTable | None = None
    latent_attention: LatentAttentionTable | None = None
    latent_attention_fp8: LatentAttentionTable | None = None
    latent_map: LatentMapTable | None = None

    elementwise: StreamCost
    hit_test: StreamCost
    score_pages: StreamCost
    select_pages: StreamCost
    resolve_pages: StreamCost
    zero_copy: ZeroCopyCost
    copy_h2d: CopyCost
    copy_d2h: CopyCost
    submit: SubmitCost
    host_gather: ThreadCost
    bar_write: ThreadCost
    bookkeeping: BookkeepingCost
    kernel_launch: FixedCost
    graph_launch: FixedCost
    stream_sync: FixedCost
    read_back: FixedCost
    thread_wake: FixedCost
    doorbell: FixedCost
    ready_flag: FixedCost
    interference: InterferenceCost
    prefill_attention: ArithmeticCost = PREFILL_ATTENTION
    prefill_latent_attention: ArithmeticCost = PREFILL_ATTENTION
    prefill_indexer: ArithmeticCost = PREFILL_INDEXER
    prefill_chosen_attention: ArithmeticCost = PREFILL_CHOSEN
    prefill_block_indexer: ArithmeticCost = PREFILL_BLOCK_INDEXER
    prefill_block_attention: ArithmeticCost = PREFILL_BLOCK_ATTENTION
    indexer: IndexerCost = INDEXER
    block_indexer: IndexerCost = BLOCK_INDEXER
    linear_attention: StreamCost = LINEAR_ATTENTION
    prefill_linear_attention: ScanCost = PREFILL_LINEAR_ATTENTION

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: int) -> int:
        return check_version(value, SCHEMA_VERSION, "profile")

    def sources(self) -> dict[str, Source]:
        """Source of every cost, by its field."""
        costs = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: Source(cost.source) for name, cost in costs.items() if hasattr(cost, "source")}


def load_profile(path: Path) -> Profile:
    """Read a profile file. Raises `ProfileError` naming the file, the field and the rule."""
    data = read_json(path, ProfileError)
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: a JSON object is expected")
    if data.get("kind") == "operations":
        raise ProfileError(f"{path}: a calibrated machine, not a profile of rates: give it as --machine")
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{path}: {explain(Profile, error)}") from None


def with_costs(profile: Profile, changes: Mapping[tuple[str, ...], Any]) -> Profile:
    """A profile with fields changed, by path: a cost that was set by hand is nobody's measurement any more.

    Unless a source is set with it. Raises `SpecError` for unknown fields and bad values.
    """
    by_hand: dict[tuple[str, ...], str] = {}
    for cost, *field in changes:
        if field and field[0] not in Cost.model_fields:
            by_hand[(cost, "source")] = "assumed"
            if isinstance(getattr(profile, cost, None), Cost):
                by_hand[(cost, "note")] = "set by hand"
    return apply(profile, {**by_hand, **changes}, "profile")
