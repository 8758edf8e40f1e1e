"""Measured kernel times carried over to a GPU that nobody measured, along the roofline.

Knows nothing about schedules, nor about what else sets GPUs apart than memory bandwidth and arithmetic: caches, clocks.
How far off it is between GPUs that were measured: `benchmarks/kernel_scaling.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clo.kernel_tables import KernelTable
from clo.specs import GpuSpec

SAME_RATE = 1e-3
"""Datasheets round: rates this close are those of one GPU."""


def measured_on(table: KernelTable, gpu: GpuSpec) -> bool:
    """Whether the rates of `gpu` are those of the GPU that the table was measured on."""
    return math.isclose(gpu.hbm_bytes_per_s, table.hbm_bytes_per_s, rel_tol=SAME_RATE) and math.isclose(
        gpu.peak_flops_per_s, table.flops_per_s, rel_tol=SAME_RATE
    )


def scaled_seconds(table: KernelTable, gpu: GpuSpec, *values: Any, **changes: Any) -> Any:
    """Seconds on `gpu` at `values`, in the order of `table.ARGUMENTS`; numbers or broadcastable arrays.

    The table's latency floor stays, what a kernel takes beyond it grows as its roofline does from one GPU to the other:
    `floor + (seconds - floor) * roofline there / roofline here`, which is how a table goes on past its largest sizes.
    On the GPU that was measured this is the table. `changes` are to fields of it, as to the width of its weights.
    Never less than the roofline: what a benchmark read faster came from a cache, which a step passes all its weights
    and keys through between two uses. Raises `ValueError` for sizes that are not positive.
    """
    here = table.seconds(*values)
    if measured_on(table, gpu) and not changes:
        return np.maximum(here, table.roofline_seconds(*values))
    rates = {"hbm_bytes_per_s": gpu.hbm_bytes_per_s, "flops_per_s": gpu.peak_flops_per_s}
    there = table.model_copy(update=rates | changes)
    bound = there.roofline_seconds(*values)
    growth = bound / table.roofline_seconds(*values)
    return np.maximum(table.floor_s + (here - table.floor_s) * growth, bound)
