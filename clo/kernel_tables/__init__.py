"""Measured GPU kernel times as small monotone tables, one kind for each kind of kernel."""

from clo.kernel_tables.all_reduce import AllReduceTable
from clo.kernel_tables.attention import DecodeAttentionTable, LatentAttentionTable
from clo.kernel_tables.products import ExpertsTable, GemmTable, LatentMapTable
from clo.kernel_tables.table import BYTES_PER_VALUE, LOG_STEP, Axis, Floats, KernelTable

__all__ = [
    "BYTES_PER_VALUE",
    "LOG_STEP",
    "AllReduceTable",
    "Axis",
    "DecodeAttentionTable",
    "ExpertsTable",
    "Floats",
    "GemmTable",
    "KernelTable",
    "LatentAttentionTable",
    "LatentMapTable",
]
