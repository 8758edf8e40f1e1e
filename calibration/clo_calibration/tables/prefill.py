"""What share of the datasheet rate causal attention over long prompts reaches. Knows nothing about tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clo.kernel_tables import Floats
from clo.profile import ArithmeticCost, Source
from clo_calibration.tables.measurements import (
    PACKAGE_VERSION,
    Samples,
    read_hardware,
    read_prefill_attention,
    read_prefill_latent_attention,
)

SHORTEST_PROMPT = 8192
FEWEST_HEADS = 8
HEAD_DIM = 128
LATENT_DIMS = 192 + 128
"""Of a key and a value: latent attention makes them before it attends to a prompt."""
WITHOUT_LATENT = ("rtx-pro-6000",)
"""GPUs on which no kernel that does so was timed."""


def prefill_costs(gpu: str, data_root: Path | None = None) -> dict[str, ArithmeticCost]:
    """Entries of a profile, by name. Raises `ProfileError` if the measurements are missing."""
    rate = read_hardware(gpu, data_root)["flops_per_s"]
    costs = {"prefill_attention": attention_cost(read_prefill_attention(gpu, data_root), 2 * HEAD_DIM, rate)}
    if gpu not in WITHOUT_LATENT:
        samples = read_prefill_latent_attention(gpu, data_root)
        costs["prefill_latent_attention"] = attention_cost(samples, LATENT_DIMS, rate)
    return costs


def attention_cost(samples: Samples, dims: int, flops_per_s: float) -> ArithmeticCost:
    """The median share over long prompts of many heads; points are (batch, query heads, prompt tokens).

    `dims` is the width of a key and a value together.
    """
    chosen = samples.take((samples.points[:, 1] >= FEWEST_HEADS) & (samples.points[:, 2] >= SHORTEST_PROMPT))
    shares = causal_flops(chosen.points, dims) / chosen.seconds / flops_per_s
    return ArithmeticCost(
        source=Source.AICONFIGURATOR,
        note=f"{', '.join(chosen.labels['kernels'])} of {chosen.labels['framework_version']}, aiconfigurator-core "
        f"{PACKAGE_VERSION}, prompts of {SHORTEST_PROMPT} tokens and more",
        samples=len(shares),
        efficiency=round(float(np.median(shares)), 4),
        spread=round(float(shares.std() / shares.mean()), 4),
    )


def causal_flops(points: Floats, dims: int) -> Floats:
    """Two for each value of a key and of a value, for each pair of a token and one not after it (half for itself)."""
    batch, heads, tokens = points.T
    return np.asarray(2.0 * dims * batch * heads * tokens**2 / 2.0)
