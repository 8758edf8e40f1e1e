"""What a run of a design says, the same for clock, simulator and machine. Knows nothing about how it was obtained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from clo.files import read_json, write_json
from clo.specs import Design, Workload
from clo.specs.base import Spec, check_version

SCHEMA_VERSION = 1


class OpTotal(Spec):
    """One operation name, summed over layers, mean per step."""

    seconds: float
    calls: int
    num_bytes: float
    source: str


class Roofline(Spec):
    """The least that has to move, and the time that takes on each link; `seconds` is the largest of them."""

    hbm_bytes: float
    hbm_s: float
    h2d_bytes: float
    h2d_s: float
    compute_s: float
    seconds: float


class Result(Spec):
    """One design on one machine under one workload. All times are means per decode step unless named otherwise.

    `busy_s` (main stream, by part), `contention_s` and `stall_s` (main stream, by cause) add up to `tpot_s`. `None`:
    not known of a machine that was run and not simulated.
    """

    schema_version: int = SCHEMA_VERSION
    executor: Literal["clock", "simpy", "machine"]
    model: str
    machine: str
    profile: str
    design: Design
    workload: Workload

    tpot_s: PositiveFloat
    tpot_p50_s: float
    tpot_p99_s: float
    tokens_per_s: float
    hit_rate: float
    reuse_rate: float
    overlap: float | None = None
    h2d_bytes_per_step: float
    d2h_bytes_per_step: float
    h2d_utilisation: float | None = None
    hbm_bytes_per_step: float | None = None
    cpu_launch_s: float
    cpu_threads_s: float
    device_bytes: float
    kv_device_bytes: float
    host_bytes: float
    memory: dict[str, float]
    num_pages: int
    budget_pages: int
    slot_pages: int

    busy_s: dict[str, float]
    stall_s: dict[str, float]
    contention_s: float
    lane_busy_s: dict[str, float]
    ops: dict[str, OpTotal]
    roofline: Roofline | None = None
    measured_share: float
    source_shares: dict[str, float]
    assumptions: tuple[str, ...] = ()
    intervals: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="90% prediction intervals by the field's name, where they were asked for"
    )
    num_gpus: PositiveInt = Field(default=1, description="GPUs that share the model")
    interval_share: float | None = Field(
        default=None, description="share of busy time that rests on costs whose spread is known: only these vary"
    )

    @field_validator("schema_version")
    @classmethod
    def _readable(cls, value: int) -> int:
        return check_version(value, SCHEMA_VERSION, "result")

    @property
    def gpu_tokens_per_s(self) -> float:
        """Tokens a second for each of the GPUs."""
        return self.tokens_per_s / self.num_gpus

    @property
    def total_stall_s(self) -> float:
        """All stalls of the main stream."""
        return sum(self.stall_s.values())

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))


def load_result(path: Path) -> Result:
    """Read a result. Raises `CloError` naming the file and the problem."""
    return Result.parse(read_json(path), where=str(path))
