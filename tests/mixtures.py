"""A small mixture of experts, and measurements of such by a known law."""

from __future__ import annotations

from typing import Any

import numpy as np

from clo import presets
from clo.specs import ModelSpec
from clo_calibration.tables import experts as points_of

DENSE = presets.load_model("llama-3-8b")
MIXTURE = {"num_experts": 16, "experts_per_token": 2, "intermediate_size": 1792}
HARDWARE = {"hbm_bytes_per_s": 4e12, "flops_per_s": 8e14}


def mixture(**fields: Any) -> ModelSpec:
    """Llama-3-8B with small experts in place of its MLPs."""
    return DENSE.with_fields(experts=MIXTURE | fields)


def timed_experts(law: Any, shapes: list[tuple[int, int, int, int]]) -> dict[str, np.ndarray[Any, Any]]:
    """Columns as `aiconfigurator-core` has them."""
    rows = [
        (tokens, *shape, gpus)
        for shape in shapes
        for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
        for gpus in (1, 2, 4, 8, 16)
    ]
    names = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    columns: dict[str, Any] = dict(zip(names, np.array(rows, dtype=np.int64).T, strict=True))
    sizes = points_of.sizes(np.array(rows, dtype=np.float64))
    labels = {"moe_dtype": "bfloat16", "distribution": "balanced", "version": "1.0", "device": "Test GPU"}
    columns |= {k: np.full(len(rows), v, dtype=object) for k, v in (labels | {"kernel_source": "fused"}).items()}
    return columns | {"moe_ep_size": np.ones(len(rows), dtype=int), "latency": 1e3 * law(*sizes.T)}


SHAPES = [(2048, 768, 8, 128), (4096, 1536, 8, 128), (4096, 14336, 2, 8), (6144, 2048, 4, 64)]


def law(weights: Any, rows: Any) -> Any:
    return 4e-6 + 1.2 * np.maximum(2 * weights / 4e12, 2 * weights * rows / 8e14)
