"""Small kernel tables by known laws, and the shipped ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from clo.kernel_tables import (
    AllReduceTable,
    DecodeAttentionTable,
    ExpertsTable,
    GemmTable,
    KernelTable,
    LatentAttentionTable,
    LatentMapTable,
)
from clo_calibration.tables import fit, measurements

TABLES = Path(__file__).parents[1] / "calibration" / "profiles"
HARDWARE = {"hbm_bytes_per_s": 1e12, "flops_per_s": 1e14}

KINDS: dict[str, type[KernelTable]] = {
    "gemm": GemmTable,
    "decode_attention": DecodeAttentionTable,
    "all_reduce": AllReduceTable,
    "experts": ExpertsTable,
    "gemm_fp8": GemmTable,
    "experts_fp8": ExpertsTable,
    "gemm_4bit": GemmTable,
    "experts_4bit": ExpertsTable,
    "latent_attention": LatentAttentionTable,
    "latent_map": LatentMapTable,
    "decode_attention_fp8": DecodeAttentionTable,
    "latent_attention_fp8": LatentAttentionTable,
}


def small_gemm() -> GemmTable:
    axes = {"m": (1.0, 16.0, 4096.0), "n": (64.0, 1024.0, 8192.0), "k": (64.0, 4096.0)}
    m, n, k = np.meshgrid(*axes.values(), indexing="ij")
    seconds = 2e-6 + np.maximum(2 * (m * k + k * n + m * n) / 8e11, 2 * m * n * k / 7e13)
    return GemmTable.from_latencies(seconds, **axes, **HARDWARE)


def decode_law(batch: Any, heads: Any, kv_heads: Any, head_dim: Any, kv_tokens: Any) -> Any:
    return 5e-6 + 4.0 * batch * head_dim * (kv_heads * kv_tokens + heads) / 8e11


def small_decode() -> DecodeAttentionTable:
    axes = {
        "batch": (1.0, 4.0, 64.0),
        "num_query_heads": (1.0, 8.0, 32.0),
        "num_kv_heads": (1.0, 8.0),
        "head_dim": (64.0, 128.0),
        "kv_tokens": (2.0, 128.0, 4096.0, 65536.0),
    }
    seconds = decode_law(*np.meshgrid(*axes.values(), indexing="ij"))
    return DecodeAttentionTable.from_latencies(seconds, **axes, **HARDWARE)


def shipped(gpu: str, kind: str) -> Any:
    return KINDS[kind].model_validate(json.loads((TABLES / f"{gpu}.json").read_text())[kind])


def kinds_of(gpu: str) -> list[str]:
    """Tables that a GPU has."""
    return [kind for kind in KINDS if gpu not in fit.WITHOUT.get(kind, ())]


SHIPPED = [(gpu, kind) for gpu in measurements.GPUS for kind in kinds_of(gpu)]


def at(table: KernelTable, values: Any) -> Any:
    return table.seconds(*values)


def monotone_case(table: KernelTable, data: st.DataObject) -> None:
    size = st.floats(min_value=-1.5, max_value=7.0).map(lambda exponent: 10.0**exponent)
    point = [data.draw(st.one_of(size, st.sampled_from(getattr(table, name))), label=name) for name in table.ARGUMENTS]
    axis = data.draw(st.sampled_from(table.rising_axes()), label="axis")
    factor = data.draw(st.one_of(st.floats(1.0, 1.001), st.floats(1.0, 1e4)), label="factor")
    further = [value * factor if i == axis else value for i, value in enumerate(point)]
    assert at(table, further) >= at(table, point) * (1.0 - 1e-12)
