"""What a machine can do at best: capacities that operations share. Knows nothing about what an operation costs."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from clo.specs.base import Spec


class GpuSpec(Spec):
    """One GPU."""

    memory_bytes: PositiveFloat = Field(description="device memory, bytes")
    num_sms: PositiveInt = Field(description="streaming multiprocessors")
    hbm_bytes_per_s: PositiveFloat = Field(description="device memory bandwidth, bytes/s (datasheet)")
    peak_flops_per_s: PositiveFloat = Field(description="dense bf16 rate, FLOP/s (datasheet)")


class LinkSpec(Spec):
    """The host link of one GPU, each direction on its own: what large copies reach, not the wire rate."""

    h2d_bytes_per_s: PositiveFloat = Field(description="host to device, bytes/s")
    d2h_bytes_per_s: PositiveFloat = Field(description="device to host, bytes/s")


class HostSpec(Spec):
    """The host's share for one GPU."""

    memory_bytes: PositiveFloat = Field(description="host memory that may be pinned for KV, bytes")
    memory_bytes_per_s: PositiveFloat = Field(description="host memory bandwidth, bytes/s")
    num_threads: PositiveInt = Field(description="CPU threads that may work for one GPU")


MOST_GPUS = 8
"""GPUs that share a layer stand in one machine."""


class MachineSpec(Spec):
    """One GPU with its link and its share of the host, and how many such GPUs hold a model together."""

    name: str = Field(description="how reports call it")
    source: str = Field(default="", description="where the numbers were read")
    profile: str = Field(
        description="the profile that prices operations on this machine: a preset, or a path from this file"
    )
    gpu: GpuSpec
    link: LinkSpec
    host: HostSpec
    tensor_parallel: PositiveInt = Field(
        default=1,
        le=MOST_GPUS,
        description="GPUs that hold one copy of the model together, a part of every layer each (tensor parallelism)",
    )
    attention_by: Literal["heads", "sequences"] = Field(
        default="heads",
        description="what such GPUs deal out attention and KV by: each has a part of the heads of every sequence, or "
        "some sequences whole (data-parallel attention)",
    )
    reserve_bytes: float = Field(default=4e9, ge=0, description="device memory for context, activations, workspace")

    @property
    def deals_sequences(self) -> bool:
        """Whether GPUs share the model, and each attends for sequences of its own."""
        return self.tensor_parallel > 1 and self.attention_by == "sequences"

    @property
    def num_owners(self) -> int:
        """GPUs that have sequences of their own: one, unless they deal them out."""
        return self.tensor_parallel if self.deals_sequences else 1

    def own_sequences(self, batch: int) -> int:
        """Sequences of a batch that a GPU attends for, and whose KV it keeps: of such GPUs those of the fullest."""
        return math.ceil(batch / self.num_owners)

    @property
    def label(self) -> str:
        """How reports call what holds one copy of the model."""
        return self.name if self.tensor_parallel == 1 else f"{self.tensor_parallel} x {self.name}"
