"""What kernels cost that a profile has tables of measured times for. Knows no other cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, TypeVar

from clo.errors import SpecError
from clo.kernel_scaling import measured_on, scaled_seconds
from clo.kernel_tables import (
    BYTES_PER_VALUE,
    AllReduceTable,
    DecodeAttentionTable,
    ExpertsTable,
    GemmTable,
    KernelTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo.profile import Profile
from clo.schedule.work import AllReduce, DecodeAttention, Experts, Gemm, LatentAttention, LatentMap
from clo.specs import MachineSpec

Timed = Gemm | Experts | DecodeAttention | LatentAttention | LatentMap | AllReduce
"""Work that tables price."""

FP8_BYTES = 1.0
MOST_4BIT_BYTES = 0.625
"""Of a weight of four bits, with a scale of two bytes for every 16 of them at most."""

Table = TypeVar("Table", bound=KernelTable)


@dataclass(frozen=True)
class TablePrices:
    """Prices such work on one machine: as measured, or carried over to its GPU along the roofline."""

    profile: Profile
    machine: MachineSpec

    def seconds(self, work: Timed) -> Any:
        """Time of `work` when nothing else runs; where its sizes are arrays an array."""
        table = self.table(work)
        sizes = _sizes(work, table)
        if isinstance(work, AllReduce):
            # what bounds it are the links between GPUs, not the rates that times are carried over by
            return table.seconds(*sizes)
        if isinstance(work, Gemm | Experts) and not self.times_width(work):
            # nobody timed such weights: so many bytes of the same kernel, which still multiplies in bf16
            changes = {"weight_bytes": work.weight_bytes, "arithmetic_bytes": float(BYTES_PER_VALUE)}
            return scaled_seconds(table, self.machine.gpu, *sizes, **changes)
        return scaled_seconds(table, self.machine.gpu, *sizes)

    def table(self, work: Timed) -> KernelTable:
        """The measured times behind a price. Raises `SpecError` where the profile has none."""
        if isinstance(work, Gemm):
            return self.gemm(work.weight_bytes)
        if isinstance(work, Experts):
            return self.experts(work.weight_bytes)
        if isinstance(work, AllReduce):
            return self.all_reduce
        if isinstance(work, LatentAttention):
            return self.latent_attention(work.kv_bytes_per_value)
        return self.latent_map if isinstance(work, LatentMap) else self.decode_attention(work.kv_bytes_per_value)

    def measured_here(self, work: Timed) -> bool:
        """Whether the table of `work` was measured on this machine's GPU, and over caches of its width."""
        table = self.table(work)
        if isinstance(work, DecodeAttention | LatentAttention):
            assert isinstance(table, DecodeAttentionTable | LatentAttentionTable)
            if work.kv_bytes_per_value != table.kv_bytes:
                return False
        if isinstance(work, Gemm | Experts) and not self.times_width(work):
            return False
        return measured_on(table, self.machine.gpu)

    def times_width(self, work: Gemm | Experts) -> bool:
        """Whether weights of this width were timed, or other ones of four bits, if such they are."""
        timed = self.gemm(work.weight_bytes) if isinstance(work, Gemm) else self.experts(work.weight_bytes)
        both = has_4bits(work.weight_bytes) and has_4bits(timed.weight_bytes)
        return both or work.weight_bytes == timed.weight_bytes

    def gemm(self, weight_bytes: float) -> GemmTable:
        """Times of GEMMs with such weights; those of bf16 where there are none."""
        narrow = _of_width(weight_bytes, self.profile.gemm_fp8, self.profile.gemm_4bit)
        return narrow or self.profile.gemm

    def experts(self, weight_bytes: float) -> ExpertsTable:
        """Times of experts, likewise. Raises `SpecError` where there are none."""
        narrow = _of_width(weight_bytes, self.profile.experts_fp8, self.profile.experts_4bit)
        return self._there(narrow or self.profile.experts, "model.experts", "experts")

    def decode_attention(self, kv_bytes_per_value: float) -> DecodeAttentionTable:
        """Times of decode attention; those of a bf16 cache where there are none of such a one."""
        narrow = self.profile.decode_attention_fp8 if _is_narrow(kv_bytes_per_value) else None
        return narrow or self.profile.decode_attention

    def latent_attention(self, kv_bytes_per_value: float) -> LatentAttentionTable:
        """Times of latent attention, likewise. Raises `SpecError` where there are none."""
        narrow = self.profile.latent_attention_fp8 if _is_narrow(kv_bytes_per_value) else None
        return self._there(narrow or self.profile.latent_attention, "model.latent", "latent attention")

    @property
    def latent_map(self) -> LatentMapTable:
        """Times of its maps. Raises `SpecError` where there are none."""
        return self._there(self.profile.latent_map, "model.latent", "the maps of latent attention")

    @property
    def all_reduce(self) -> AllReduceTable:
        """Times of all-reduces. Raises `SpecError` where there are none, or none of so many GPUs."""
        table = self._there(self.profile.all_reduce, "machine.tensor_parallel", "an all-reduce")
        if self.machine.tensor_parallel > table.num_gpus[-1]:
            raise SpecError(
                f"machine.tensor_parallel = {self.machine.tensor_parallel}: all-reduces of profile {self.profile.name} "
                f"were timed on up to {table.num_gpus[-1]:.0f} GPUs"
            )
        return table

    def _there(self, table: Table | None, field: str, what: str) -> Table:
        if table is None:
            raise SpecError(f"{field}: profile {self.profile.name} has no times of {what}")
        return table


def has_4bits(weight_bytes: float) -> bool:
    """Whether a weight of so many bytes, its share of scales included, is one of four bits."""
    return weight_bytes <= MOST_4BIT_BYTES


def _of_width(weight_bytes: float, fp8: Table | None, four_bits: Table | None) -> Table | None:
    if has_4bits(weight_bytes):
        return four_bits
    return fp8 if weight_bytes == FP8_BYTES else None


def _is_narrow(bytes_per_value: float) -> bool:
    """Whether values must be widened before they are multiplied, as those of an fp8 cache."""
    return FP8_BYTES <= bytes_per_value < BYTES_PER_VALUE


@singledispatch
def _sizes(work: Timed, table: Any) -> tuple[Any, ...]:
    """In the order of the arguments of the work's table."""
    raise TypeError(f"no table for {type(work).__name__}")


@_sizes.register
def _(work: Gemm, _table: GemmTable) -> tuple[Any, ...]:
    return work.m, work.n, work.k


@_sizes.register
def _(work: Experts, _table: ExpertsTable) -> tuple[Any, ...]:
    return work.weight_values, work.rows


@_sizes.register
def _(work: DecodeAttention, table: DecodeAttentionTable) -> tuple[Any, ...]:
    # a cache of another width than was timed is priced as more or fewer tokens of the same bytes
    tokens = max(1.0, work.kv_tokens * work.kv_bytes_per_value / table.kv_bytes)
    return work.batch, work.num_query_heads, work.num_kv_heads, work.head_dim, tokens


@_sizes.register
def _(work: LatentAttention, table: LatentAttentionTable) -> tuple[Any, ...]:
    # vectors of another width, too
    width = work.kv_bytes_per_value / table.kv_bytes * work.vector_dim / table.VECTOR_DIM
    return work.batch, work.num_query_heads, max(1.0, work.kv_tokens * width)


@_sizes.register
def _(work: LatentMap, _table: LatentMapTable) -> tuple[Any, ...]:
    # of another width: as more or fewer heads of the same bytes
    width = work.head_dim * work.kv_rank / (LatentMapTable.HEAD_DIM * LatentMapTable.KV_RANK)
    return work.rows, work.num_heads * width


@_sizes.register
def _(work: AllReduce, _table: AllReduceTable) -> tuple[Any, ...]:
    return work.num_gpus, work.num_values
