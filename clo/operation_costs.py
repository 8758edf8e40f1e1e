"""Costs of operations as they were timed on one machine: seconds as a sum over countable features of their work.

The second kind of profile. `clo.profile` describes a GPU by its rates; this one needs no rates, only an executor that
ran the operations, and so it fits any machine that can run them. Knows nothing about how costs were fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, ValidationError, field_validator

from clo.errors import ProfileError
from clo.files import read_json
from clo.plan import DecodePlan
from clo.pricing import Demand, PricedPart, Seconds, value_of
from clo.profile import Cost, InterferenceCost, Source
from clo.schedule.graph import record_step
from clo.schedule.machine import Lane
from clo.schedule.work import (
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
    LatentAttention,
    LatentMap,
    Quantity,
    StreamKernel,
    Submit,
    Work,
    ZeroCopy,
)
from clo.specs import Design, MachineSpec, ModelSpec
from clo.specs.base import Spec, check_version, explain
from clo.traffic import Traffic

SCHEMA_VERSION = 3

GEMM_ROWS = (1, 2, 3, 4, 6, 8)
"""Rows of a GEMM at which its time per weight is a coefficient of its own: libraries work in tiles of rows, so that
time grows in steps. Linear in between.
"""


PREDICTING = ("qkv_proj", "linear_proj", "latent_proj", "query_proj", "map_queries")
"""Operations that may do something for a later layer as well."""
AS_WELL = {"qkv_proj:predicting": "qkv_proj:alone"}
"""Entries that another may stand for: where layers with keys and values lie far apart, only some depths of prefetching
predict in one of them. What a prediction adds are weights."""


class OperationCost(Cost):
    """`seconds = sum(per_unit[feature] * feature)`; features are those of `feature_values`."""

    per_unit: dict[str, NonNegativeFloat] = Field(description="seconds per unit of each feature")
    slowed: NonNegativeFloat = Field(default=0.0, description="relative growth beside another lane of host_share 1")
    host_share: NonNegativeFloat = Field(default=0.0, description="how much it slows others in turn")


class BenchmarkRow(Spec):
    """A microbenchmark: its median rate, and the relative spread of its samples."""

    name: str
    parameters: dict[str, float]
    unit: str
    per_second: NonNegativeFloat
    spread: NonNegativeFloat
    samples: int


class FitPoint(Spec):
    """One run of one operation: mean seconds as timed, and as the fitted cost gives them."""

    measured_s: NonNegativeFloat
    fitted_s: NonNegativeFloat


class OperationProfile(Spec):
    """What one machine takes for the operations of one model. Seconds."""

    kind: Literal["operations"] = "operations"
    schema_version: int = SCHEMA_VERSION
    name: str
    date: str
    note: str = ""
    machine: MachineSpec
    model: ModelSpec
    fingerprint: dict[str, str] = Field(description="what the costs depend on: processor, threads, library versions")
    operations: dict[str, OperationCost]
    handover_s: dict[Lane, NonNegativeFloat] = Field(
        default_factory=dict,
        description="from the end of an operation until this lane, which it wakes, begins",
    )
    launch_hold_s: NonNegativeFloat = Field(
        default=0.0,
        description="what the launching thread submits is seen when it next blocks, at the latest so much later: a "
        "Python thread keeps the interpreter; 0: seen at once",
    )
    rounds: int = Field(default=1, ge=1, description="of each step the fastest of so many was fitted to")
    drift: NonNegativeFloat = Field(default=0.0, description="relative spread of one run, minutes apart")
    common_spread: NonNegativeFloat = Field(
        default=0.0, description="relative spread of whole steps beyond what the spreads of operations explain"
    )
    steps_s: dict[str, float] = Field(
        default_factory=dict, description="median steps of the runs that were fitted, by design and size"
    )
    benchmarks: tuple[BenchmarkRow, ...] = ()
    fits: dict[str, tuple[FitPoint, ...]] = Field(default_factory=dict, description="what costs were fitted to")

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: int) -> int:
        return check_version(value, SCHEMA_VERSION, "operation profile")


def load_operation_profile(path: Path) -> OperationProfile:
    """Read a profile file. Raises `ProfileError` naming the file, the field and the rule."""
    data = read_json(path, ProfileError)
    if not isinstance(data, dict) or data.get("kind") != "operations":
        raise ProfileError(f"{path}: not a profile of timed operations (clo calibrate writes one)")
    try:
        return OperationProfile.model_validate(data)
    except ValidationError as error:
        raise ProfileError(f"{path}: {explain(OperationProfile, error)}") from None


def price_key(name: str, work: Work, plan: DecodePlan) -> str:
    """The entry of a profile: operations of one name that run different code are told apart."""
    design = plan.design
    if isinstance(work, DecodeAttention | LatentAttention):
        return f"{name}:{'dense' if _attends_all_it_keeps(work, plan) else 'sparse'}"
    if name == "score_pages":
        return f"{name}:{design.selector}"
    if name == "select_pages":
        # a set that is replaced whole is looked up as it is selected
        return f"{name}:{design.cache}{':replace' if design.replaces_sets else ''}"
    if name == "resolve_pages":
        return f"{name}:{'replace' if design.replaces_sets else 'diff'}"
    if name in PREDICTING and isinstance(work, Gemm | LatentMap):
        return f"{name}:{'predicting' if _predicts(name, work, plan.model) else 'alone'}"
    if name == "append_kv":
        stores = isinstance(work, StreamKernel) and isinstance(work.host_store_bytes, Amount)
        return f"{name}:{'stores' if stores else _where_tokens_go(design)}"
    return name


def _attends_all_it_keeps(work: DecodeAttention | LatentAttention, plan: DecodePlan) -> bool:
    """A dense layer attends to the context, one with a window to that, by the same code."""
    in_window = isinstance(work, DecodeAttention) and work.in_window
    return in_window or work.kv_tokens == plan.workload.context_tokens


def _predicts(name: str, work: Gemm | LatentMap, model: ModelSpec) -> bool:
    """Whether it makes the query of a later layer, too."""
    if isinstance(work, LatentMap):
        return work.num_heads > model.num_query_heads
    layer = model.linear.layers[0] if name == "linear_proj" and model.linear is not None else model.whole_layers[0]
    return work.n > next(each.n for each in model.projections_in(layer) if each.name == name)


def _where_tokens_go(design: Design) -> str:
    """Where no kernel stores pages to the host; dense layers of such a design count as its others."""
    if design.offloads:
        return "copied_back" if design.cpu_moves else "dense"
    return "kept" if design.selects else "dense"


def feature_values(work: Work, plan: DecodePlan, traffic: Traffic) -> dict[str, Seconds]:
    """What the time of `work` may grow with: numbers, or one per step and layer `[steps, layers]`.

    `all_*`: as if every head took part; `rows`: heads times sequences; `some`: whether there is anything to do;
    `several`: whether there is more than one sequence, whose tensors are not contiguous wherever one's are.
    """
    counts = _features_of(work, plan)
    values = {name: value_of(quantity, traffic) for name, quantity in counts.items()}
    varying = [quantity for quantity in counts.values() if isinstance(quantity, Amount)]
    if varying:
        values["some"] = np.minimum(1.0, traffic.amount(varying[0].name))
    if isinstance(work, IndexTokens):
        # as the decoder does it on a CPU: of all sequences, if one of them asks
        values["scanned_bytes"] = values["some"] * values["all_bytes"]
    return values


def _features_of(work: Work, plan: DecodePlan) -> dict[str, Quantity]:
    features: dict[str, Quantity] = {"calls": 1.0}
    if isinstance(work, Gemm):
        return _gemm_features(work.m, float(work.n * work.k))
    if isinstance(work, LatentMap):
        return _gemm_features(work.rows, float(work.num_heads * work.head_dim * work.kv_rank))
    if isinstance(work, Experts):
        # tokens times experts, each a product with all of an expert's weights
        passes = work.num_used * work.rows
        return features | {"weights": work.weight_values, "products": work.weight_values * work.rows, "rows": passes}
    if isinstance(work, DecodeAttention):
        rows = float(work.batch * work.num_kv_heads)
        return features | {
            "rows": rows,
            "several": float(work.batch > 1),
            "kv_bytes": 2 * rows * work.kv_tokens * work.head_dim * work.kv_bytes_per_value,
        }
    if isinstance(work, LatentAttention):
        rows = float(work.batch)
        kv_bytes = rows * work.kv_tokens * work.vector_dim * work.kv_bytes_per_value
        return features | {"rows": rows, "several": float(work.batch > 1), "kv_bytes": kv_bytes}
    if isinstance(work, StreamKernel):
        stored = work.host_store_bytes
        pages = {"pages": _scaled(stored, 1 / plan.page_bytes)} if isinstance(stored, Amount) else {}
        return features | _stream_features(work.num_bytes, plan) | pages
    if isinstance(work, IndexTokens):
        return features | _stream_features(work.num_bytes, plan)
    if isinstance(work, ZeroCopy):
        return features | {"pages": _scaled(work.num_bytes, 1 / plan.page_bytes), "bytes": work.num_bytes}
    if isinstance(work, Copy | HostGather | BarWrite):
        return features | {"pages": work.pieces, "bytes": _scaled(work.pieces, work.piece_bytes)}
    if isinstance(work, Bookkeeping):
        return features | {"heads": work.heads, "pages": work.pages, "all_pages": _if_all(work.pages, plan)}
    if isinstance(work, Submit):
        return features | {"pages": work.descriptors}
    assert isinstance(work, HostAction)
    runtime: dict[str, Quantity] = {"calls": float(work.count)}
    if work.action == "graph_launch":
        runtime["operations"] = float(graph_operations(plan))
    return runtime


def _gemm_features(m: int, weights: float) -> dict[str, Quantity]:
    """Weights, by the nearest numbers of rows that have a coefficient; beyond the last, as if it were called again."""
    last = GEMM_ROWS[-1]
    if m >= last:
        return {f"weights_{last}_rows": weights * m / last}
    above = next(at for at, rows in enumerate(GEMM_ROWS) if rows > m)
    low, high = GEMM_ROWS[above - 1], GEMM_ROWS[above]
    share = (m - low) / (high - low)
    near = {low: weights * (1.0 - share), high: weights * share}
    return {f"weights_{rows}_rows": count for rows, count in near.items() if count}


def _rows(work: Gemm | LatentMap) -> int:
    return work.m if isinstance(work, Gemm) else work.rows


@lru_cache(maxsize=64)
def graph_operations(plan: DecodePlan) -> int:
    """Operations that are submitted as one graph."""
    return len(record_step(plan).nodes)


def _stream_features(num_bytes: Quantity, plan: DecodePlan) -> dict[str, Quantity]:
    batch = plan.workload.batch
    features: dict[str, Quantity] = {"sequences": float(batch), "several": float(batch > 1)}
    if isinstance(num_bytes, Amount):
        features |= {"heads": Amount(num_bytes.name), "all_bytes": _if_all(num_bytes, plan)}
    return features | {"bytes": num_bytes}


def _scaled(quantity: Quantity, factor: float) -> Quantity:
    return Amount(quantity.name, quantity.scale * factor) if isinstance(quantity, Amount) else quantity * factor


def _if_all(quantity: Quantity, plan: DecodePlan) -> float:
    return quantity.scale * plan.offloaded_heads if isinstance(quantity, Amount) else quantity


@dataclass(frozen=True)
class OperationPricer:
    """Prices the operations of one plan from a profile of timed operations."""

    profile: OperationProfile
    plan: DecodePlan

    @property
    def interference(self) -> InterferenceCost:
        """Operations carry their own (`OperationCost.slowed`)."""
        return InterferenceCost(source=Source.MEASURED, per_sm_share=0.0, dma=0.0)

    @property
    def handover_s(self) -> Mapping[Lane, float]:
        """From the end of an operation until a lane that waited for it sees that, by this lane; else nothing."""
        return self.profile.handover_s

    @property
    def launch_hold_s(self) -> float:
        """What the launching thread submits is seen when it next blocks, at the latest so much later; 0: at once."""
        return self.profile.launch_hold_s

    def seconds(self, work: Work, traffic: Traffic, name: str = "") -> Seconds:
        """Time of the operation `name` when nothing else runs. Raises `ProfileError` if it was never timed."""
        cost = self._cost(work, name)
        total: Seconds = 0.0
        values = feature_values(work, self.plan, traffic)
        if isinstance(work, Gemm | LatentMap) and not values.keys() <= cost.per_unit.keys():
            raise ProfileError(
                f"profile {self.profile.name}: operation {name} was never timed for a batch of {_rows(work)}"
            )
        for feature, value in values.items():
            if per_unit := cost.per_unit.get(feature, 0.0):
                total = total + per_unit * value
        return total

    def source(self, work: Work, name: str = "") -> Source:
        """Everything was timed."""
        return Source(self._cost(work, name).source)

    def uncertainty(self, work: Work, name: str = "") -> tuple[str, float]:
        """The entry that prices the operation, and its relative spread."""
        return price_key(name, work, self.plan), self._cost(work, name).spread

    @property
    def common_spread(self) -> float:
        """What whole steps vary beyond their operations, and a machine from one time to another."""
        return math.hypot(self.profile.common_spread, self.profile.drift)

    def segment_demand(self, parts: Sequence[PricedPart], mean_bytes: float) -> Demand:
        """How much others slow these operations and how much they slow others, weighted by their time."""
        seconds = np.array([part.seconds for part in parts])
        costs = [self._cost(part.work, part.name) for part in parts]
        weights = seconds / seconds.sum() if seconds.sum() else np.full(len(parts), 1 / len(parts))
        return Demand(
            is_kernel=True,
            slowed=float(weights @ [cost.slowed for cost in costs]),
            host_share=float(weights @ [cost.host_share for cost in costs]),
        )

    def _cost(self, work: Work, name: str) -> OperationCost:
        key = price_key(name, work, self.plan)
        operations = self.profile.operations
        cost = operations.get(key) or operations.get(AS_WELL.get(key, ""))
        if cost is None:
            raise ProfileError(
                f"profile {self.profile.name}: operation {key} was never timed: calibrate with a design that uses it"
            )
        return cost


def is_runtime(work: Work) -> bool:
    """What the launching thread does, and flags: timed where it happens, never alone."""
    return isinstance(work, HostAction | Submit)
