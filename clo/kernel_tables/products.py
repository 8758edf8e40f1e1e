"""Tables of products with weights: GEMMs, mixtures of experts, the maps of latent attention."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field, PositiveFloat

from clo.kernel_tables.table import BYTES_PER_VALUE, Axis, KernelTable

_WEIGHT_BYTES = "of a weight, scales included: bf16, fp8 or 4 bits"
_ARITHMETIC_BYTES = (
    "of what is multiplied: fp8 kernels do twice the arithmetic of bf16 in the same time; none: as of the weights"
)


def _rate(table: GemmTable | ExpertsTable) -> float:
    """Datasheet flop/s of kernels with such weights."""
    return table.flops_per_s * BYTES_PER_VALUE / (table.arithmetic_bytes or table.weight_bytes)


class GemmTable(KernelTable):
    """Time of `C[m, n] = A[m, k] @ B[k, n]` (a linear layer: m rows, k inputs, n outputs), by width of weights."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("m", "n", "k")

    m: Axis
    n: Axis
    k: Axis
    weight_bytes: PositiveFloat = Field(default=2.0, description=_WEIGHT_BYTES)
    arithmetic_bytes: PositiveFloat | None = Field(default=None, description=_ARITHMETIC_BYTES)

    def roofline_seconds(self, m: Any, n: Any, k: Any) -> Any:
        """`max(bytes / HBM bandwidth, flops / peak)` with every matrix moved once."""
        num_bytes = BYTES_PER_VALUE * (m * k + m * n) + self.weight_bytes * k * n
        return np.maximum(num_bytes / self.hbm_bytes_per_s, 2.0 * m * n * k / _rate(self))


class ExpertsTable(KernelTable):
    """Time of a mixture of experts: those used read `weight_values` weights, and `rows` tokens pass each, in the mean.

    Gate, up and down projection, without the router. What bounds such kernels, bytes and
    arithmetic, needs no more than these two numbers; what experts of the same size differ by otherwise is in the
    table's errors.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("weight_values", "rows")

    weight_values: Axis
    rows: Axis
    weight_bytes: PositiveFloat = Field(default=2.0, description=_WEIGHT_BYTES)
    arithmetic_bytes: PositiveFloat | None = Field(default=None, description=_ARITHMETIC_BYTES)

    def roofline_seconds(self, weight_values: Any, rows: Any) -> Any:
        """`max(bytes / HBM bandwidth, flops / peak)` with every weight used read once."""
        num_bytes = self.weight_bytes * weight_values
        return np.maximum(num_bytes / self.hbm_bytes_per_s, 2.0 * weight_values * rows / _rate(self))


class LatentMapTable(KernelTable):
    """Time of a product of each of `num_heads` heads' own, `rows` tokens: between `HEAD_DIM` and `KV_RANK` values.

    The mean of both ways: queries before latent attention, outputs after it.
    """

    ARGUMENTS: ClassVar[tuple[str, ...]] = ("rows", "num_heads")
    KV_RANK: ClassVar[int] = 512
    HEAD_DIM: ClassVar[int] = 128

    rows: Axis
    num_heads: Axis

    def roofline_seconds(self, rows: Any, num_heads: Any) -> Any:
        """`max(bytes / HBM bandwidth, flops / peak)` with every matrix moved once."""
        weights = num_heads * self.HEAD_DIM * self.KV_RANK
        num_bytes = BYTES_PER_VALUE * (weights + rows * num_heads * (self.HEAD_DIM + self.KV_RANK))
        return np.maximum(num_bytes / self.hbm_bytes_per_s, 2.0 * rows * weights / self.flops_per_s)
