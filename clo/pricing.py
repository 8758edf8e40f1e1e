"""What an operation's work costs alone, and what it asks of shared resources while it runs.

Joins a profile (costs) with a machine (capacities). Knows nothing about order, contention or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from clo.kernel_scaling import measured_on
from clo.kernel_tables import BYTES_PER_VALUE
from clo.profile import Cost, IndexerCost, InterferenceCost, Profile, Source, StreamCost
from clo.schedule.machine import Lane
from clo.schedule.work import (
    AllReduce,
    Amount,
    BarWrite,
    Bookkeeping,
    Copy,
    DecodeAttention,
    Experts,
    Gemm,
    HostAction,
    HostGather,
    IndexTokens,
    KernelWork,
    LatentAttention,
    LatentMap,
    Quantity,
    StreamKernel,
    Submit,
    Work,
    ZeroCopy,
)
from clo.specs import MachineSpec
from clo.table_prices import TablePrices, Timed
from clo.traffic import Traffic

NORMAL_P95 = 1.645
"""Of normal errors nine in ten lie within so many standard deviations."""

Seconds = float | NDArray[np.float64]
"""A number, or one per step and layer `[steps, layers]`."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Shares of capacities that work takes at full speed (0 to 1), and how it disturbs or is disturbed."""

    h2d: float = 0.0
    d2h: float = 0.0
    hbm: float = 0.0
    host_memory: float = 0.0
    sms_taken: float = 0.0
    is_dma: bool = False
    is_kernel: bool = False
    slowed: float = 0.0
    """Relative growth of the duration beside work on another lane that keeps the host as busy as a kernel does."""
    host_share: float = 0.0
    """How much of that disturbance this work is to others (0 to 1)."""


class PricedPart(NamedTuple):
    """One operation of a segment: its name, its work, and its mean seconds alone."""

    name: str
    work: Work
    seconds: float


class Prices(Protocol):
    """What a simulation needs to know about costs, whatever they were learnt from."""

    @property
    def interference(self) -> InterferenceCost:
        """How operations disturb each other beyond shared bandwidth."""

    @property
    def handover_s(self) -> Mapping[Lane, float]:
        """From the end of an operation until a lane that waited for it sees that, by this lane; else nothing."""

    @property
    def launch_hold_s(self) -> float:
        """What the launching thread submits is seen when it next blocks, at the latest so much later; 0: at once."""

    def seconds(self, work: Work, traffic: Traffic, name: str = "") -> Seconds:
        """Time of `work` of the operation `name` when nothing else runs."""

    def source(self, work: Work, name: str = "") -> Source:
        """How that time is known."""

    def uncertainty(self, work: Work, name: str = "") -> tuple[str, float]:
        """The entry that prices the operation, and the relative spread of that price (0: not known)."""

    @property
    def common_spread(self) -> float:
        """Relative spread of whole steps beyond that of their operations."""

    def segment_demand(self, parts: Sequence[PricedPart], mean_bytes: float) -> Demand:
        """What operations that follow one another take from shared resources; `mean_bytes`: of device memory."""


def hbm_bytes(work: Work, traffic: Traffic) -> Seconds:
    """Bytes `work` moves through device memory."""
    if isinstance(work, Gemm):
        return BYTES_PER_VALUE * (work.m * work.k + work.m * work.n) + work.weight_bytes * work.k * work.n
    if isinstance(work, Experts):
        return work.weight_bytes * work.weight_values
    if isinstance(work, DecodeAttention):
        heads = work.batch * work.num_kv_heads
        return 2.0 * heads * work.kv_tokens * work.head_dim * work.kv_bytes_per_value
    if isinstance(work, LatentAttention):
        return work.batch * work.kv_tokens * work.vector_dim * work.kv_bytes_per_value
    if isinstance(work, LatentMap):
        weights = work.head_dim * work.kv_rank
        return float(BYTES_PER_VALUE * work.num_heads * (weights + work.rows * (work.head_dim + work.kv_rank)))
    if isinstance(work, StreamKernel | IndexTokens):
        return value_of(work.num_bytes, traffic)
    if isinstance(work, AllReduce):
        return 2.0 * BYTES_PER_VALUE * work.num_values
    if isinstance(work, ZeroCopy | Copy | BarWrite):
        return link_bytes(work, traffic)
    return 0.0


def link_bytes(work: Work, traffic: Traffic) -> Seconds:
    """Bytes `work` moves over the host link, in whichever direction."""
    if isinstance(work, ZeroCopy):
        return value_of(work.num_bytes, traffic)
    if isinstance(work, Copy | BarWrite):
        return value_of(work.pieces, traffic) * work.piece_bytes
    if isinstance(work, StreamKernel):
        return value_of(work.host_store_bytes, traffic)
    return 0.0


def value_of(quantity: Quantity, traffic: Traffic) -> Seconds:
    """A number known from the plan, or the counts `[steps, layers]` of an amount."""
    return traffic.evaluate(quantity) if isinstance(quantity, Amount) else quantity


@dataclass(frozen=True)
class Pricer:
    """Prices work on one machine."""

    profile: Profile
    machine: MachineSpec

    @property
    def tables(self) -> TablePrices:
        """Prices by measured kernel times."""
        return TablePrices(self.profile, self.machine)

    @property
    def interference(self) -> InterferenceCost:
        """As the profile has it."""
        return self.profile.interference

    @property
    def handover_s(self) -> Mapping[Lane, float]:
        """Streams that wait for each other's events lose no time that the profile would know of."""
        return {}

    @property
    def launch_hold_s(self) -> float:
        """A GPU begins with what has been launched while more is being launched."""
        return 0.0

    def seconds(self, work: Work, traffic: Traffic, name: str = "") -> Seconds:
        """Time of `work` when nothing else runs: a float if the plan fixes it, else `[steps, layers]`.

        The same for every operation that does this work, whatever its `name`.
        """
        return float(self.tables.seconds(work)) if isinstance(work, Timed) else self._seconds(work, traffic)

    def cost(self, work: Work) -> Cost | None:
        """The profile entry behind a price; `None` for the fitted kernel tables."""
        return None if isinstance(work, Timed) else self._entry_cost(work)

    def source(self, work: Work, name: str = "") -> Source:
        """How the price of `work` is known."""
        if isinstance(work, Timed):
            return Source(self.tables.table(work).source) if self.tables.measured_here(work) else Source.ASSUMED
        source = Source(self._entry_cost(work).source)
        return Source.ASSUMED if source is Source.AICONFIGURATOR and not self._on_measured_gpu else source

    def uncertainty(self, work: Work, name: str = "") -> tuple[str, float]:
        """The profile's entry and its spread; fitted tables know theirs from points held out of the fit.

        Times carried over to another GPU have none that is known.
        """
        if isinstance(work, Timed):
            error = self.tables.table(work).p90_abs_relative_error
            return type(work).__name__, error / NORMAL_P95 if self.tables.measured_here(work) else 0.0
        known = self.source(work) is Source(self._entry_cost(work).source)
        return self._entry(work), self._entry_cost(work).spread if known else 0.0

    @property
    def _on_measured_gpu(self) -> bool:
        """Whether this machine's GPU is the one whose published measurements the profile has."""
        return measured_on(self.profile.gemm, self.machine.gpu)

    @property
    def common_spread(self) -> float:
        """Not known: no step of this machine was run."""
        return 0.0

    def segment_demand(self, parts: Sequence[PricedPart], mean_bytes: float) -> Demand:
        """Operations of a segment contend alike: the first stands for them, for as long as all of them take."""
        return self.demand(parts[0].work, sum(part.seconds for part in parts), mean_bytes)

    def demand(self, work: Work, mean_seconds: float, mean_bytes: float) -> Demand:
        """What `work` takes from shared resources; `mean_*` describe a typical instance of it."""
        link, hbm = self.machine.link, self.machine.gpu.hbm_bytes_per_s
        if isinstance(work, ZeroCopy):
            rate = self.zero_copy_rate(work.num_ctas)
            return Demand(
                h2d=rate / link.h2d_bytes_per_s,
                hbm=min(1.0, rate / hbm),
                host_memory=min(1.0, rate / self.machine.host.memory_bytes_per_s),
                sms_taken=min(1.0, work.num_ctas / self.machine.gpu.num_sms),
            )
        if isinstance(work, Copy):
            rate, inward = self.copy_rate(work), work.direction == "h2d"
            return Demand(
                h2d=rate / link.h2d_bytes_per_s if inward else 0.0,
                d2h=0.0 if inward else rate / link.d2h_bytes_per_s,
                hbm=min(1.0, rate / hbm),
                host_memory=min(1.0, rate / self.machine.host.memory_bytes_per_s),
                is_dma=True,
            )
        if isinstance(work, BarWrite):
            rate = self.bar_write_rate(work)
            return Demand(
                h2d=min(1.0, rate / link.h2d_bytes_per_s),
                hbm=min(1.0, rate / hbm),
                host_memory=min(1.0, rate / self.machine.host.memory_bytes_per_s),
            )
        if isinstance(work, HostGather):
            return Demand(host_memory=min(1.0, 2 * self.gather_rate(work) / self.machine.host.memory_bytes_per_s))
        if isinstance(work, KernelWork | AllReduce):
            busy = min(1.0, mean_bytes / (mean_seconds * hbm)) if mean_seconds else 0.0
            beside = self._exchanged_bytes(work) / mean_seconds if mean_seconds else 0.0
            h2d, d2h = (min(1.0, beside / rate) for rate in (link.h2d_bytes_per_s, link.d2h_bytes_per_s))
            return Demand(h2d=h2d, d2h=d2h, hbm=busy, is_kernel=True)
        return Demand()

    def _exchanged_bytes(self, work: Work) -> float:
        """What each GPU sends, and receives, over the host link because it has no other to its neighbours.

        An all-reduce moves at least `2 (n - 1) / n` of the values each way (Patarasuk and Yuan 2009).
        """
        if not isinstance(work, AllReduce) or not self.tables.all_reduce.over_host_link:
            return 0.0
        return 2.0 * (work.num_gpus - 1) / work.num_gpus * BYTES_PER_VALUE * work.num_values

    @property
    def _into_device(self) -> float:
        """What the link and the host memory behind it can deliver, bytes/s."""
        return min(self.machine.link.h2d_bytes_per_s, self.machine.host.memory_bytes_per_s)

    def zero_copy_rate(self, num_ctas: int) -> float:
        """Bytes/s of a zero-copy kernel: the link, or what its thread blocks keep in flight."""
        return min(self._into_device, self.profile.zero_copy.rate(num_ctas))

    def copy_rate(self, work: Copy) -> float:
        """Bytes/s of a copy engine for pieces of this size."""
        if work.direction == "h2d":
            return min(self._into_device, self.profile.copy_h2d.rate(work.piece_bytes))
        out_of_device = min(self.machine.link.d2h_bytes_per_s, self.machine.host.memory_bytes_per_s)
        return min(out_of_device, self.profile.copy_d2h.rate(work.piece_bytes))

    def bar_write_rate(self, work: BarWrite) -> float:
        """Bytes/s of CPU threads writing through the BAR."""
        cost = self.profile.bar_write
        per_thread = work.piece_bytes / (cost.per_piece_s + work.piece_bytes / cost.bytes_per_s_per_thread)
        threads = min(work.num_threads, self.machine.host.num_threads)
        return min(threads * per_thread, cost.link_share * self._into_device)

    def gather_rate(self, work: HostGather) -> float:
        """Bytes/s of CPU threads gathering into a staging buffer (each byte is read and written once)."""
        cost = self.profile.host_gather
        per_thread = work.piece_bytes / (cost.per_piece_s + work.piece_bytes / cost.bytes_per_s_per_thread)
        threads = min(work.num_threads, self.machine.host.num_threads)
        return min(threads * per_thread, self.machine.host.memory_bytes_per_s / 2)

    @singledispatchmethod
    def _seconds(self, work: Work, traffic: Traffic) -> Seconds:
        raise TypeError(f"no price for {type(work).__name__}")

    @_seconds.register
    def _(self, work: StreamKernel, traffic: Traffic) -> Seconds:
        cost: StreamCost = getattr(self.profile, work.kernel)
        seconds = cost.latency_s + value_of(work.num_bytes, traffic) / (
            cost.efficiency * self.machine.gpu.hbm_bytes_per_s
        )
        if work.host_store_bytes == 0.0:
            return seconds
        return seconds + value_of(work.host_store_bytes, traffic) / self.machine.link.d2h_bytes_per_s

    @_seconds.register
    def _(self, work: IndexTokens, traffic: Traffic) -> Seconds:
        cost: IndexerCost = getattr(self.profile, work.cost)
        num_bytes = value_of(work.num_bytes, traffic)
        scanned = num_bytes / (cost.efficiency * self.machine.gpu.hbm_bytes_per_s)
        # where no sequence selects its kernels start, see so, and end
        return cost.latency_s + _where_any(num_bytes, work.tokens * cost.per_token_s + scanned, 0.0)

    @_seconds.register
    def _(self, work: ZeroCopy, traffic: Traffic) -> Seconds:
        num_bytes = value_of(work.num_bytes, traffic)
        moving = self.profile.zero_copy.latency_s + num_bytes / self.zero_copy_rate(work.num_ctas)
        # with nothing to fetch the kernel starts, sees an empty list and ends
        return _where_any(num_bytes, moving, self.profile.elementwise.latency_s)

    @_seconds.register
    def _(self, work: Copy, traffic: Traffic) -> Seconds:
        pieces = value_of(work.pieces, traffic)
        cost = self.profile.copy_h2d if work.direction == "h2d" else self.profile.copy_d2h
        return _where_any(pieces, cost.latency_s + pieces * work.piece_bytes / self.copy_rate(work), 0.0)

    @_seconds.register
    def _(self, work: Submit, traffic: Traffic) -> Seconds:
        descriptors, cost = value_of(work.descriptors, traffic), self.profile.submit
        return _where_any(descriptors, cost.per_call_s + descriptors * cost.per_descriptor_s, 0.0)

    @_seconds.register
    def _(self, work: HostGather, traffic: Traffic) -> Seconds:
        return value_of(work.pieces, traffic) * work.piece_bytes / self.gather_rate(work)

    @_seconds.register
    def _(self, work: BarWrite, traffic: Traffic) -> Seconds:
        return value_of(work.pieces, traffic) * work.piece_bytes / self.bar_write_rate(work)

    @_seconds.register
    def _(self, work: Bookkeeping, traffic: Traffic) -> Seconds:
        cost = self.profile.bookkeeping
        threads = min(work.num_threads, self.machine.host.num_threads)
        heads, pages = value_of(work.heads, traffic), value_of(work.pages, traffic)
        return (heads * cost.per_head_s + pages * cost.per_page_s) / threads

    @_seconds.register
    def _(self, work: HostAction, traffic: Traffic) -> Seconds:
        return float(work.count * getattr(self.profile, work.action).seconds)

    def _entry_cost(self, work: Work) -> Cost:
        cost: Cost = getattr(self.profile, self._entry(work))
        return cost

    @staticmethod
    def _entry(work: Work) -> str:
        if isinstance(work, StreamKernel):
            return work.kernel
        if isinstance(work, Copy):
            return "copy_h2d" if work.direction == "h2d" else "copy_d2h"
        if isinstance(work, IndexTokens):
            return work.cost
        return work.action if isinstance(work, HostAction) else _COST_FIELD[type(work)]


_COST_FIELD: dict[type, str] = {
    ZeroCopy: "zero_copy",
    Submit: "submit",
    HostGather: "host_gather",
    BarWrite: "bar_write",
    Bookkeeping: "bookkeeping",
}


def _where_any(amount: Seconds, some: Seconds, none: float) -> Seconds:
    if isinstance(amount, float | int):
        return some if amount else none
    return np.where(amount > 0, some, none)
