"""What a machine can do at best: capacities that operations share. Knows nothing about what an operation costs."""

from __future__ import annotations

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


class MachineSpec(Spec):
    """One GPU with its link and its share of the host."""

    name: str = Field(description="how reports call it")
    source: str = Field(default="", description="where the numbers were read")
    profile: str = Field(
        description="the profile that prices operations on this machine: a preset, or a path from this file"
    )
    gpu: GpuSpec
    link: LinkSpec
    host: HostSpec
    reserve_bytes: float = Field(default=4e9, ge=0, description="device memory for context, activations, workspace")
