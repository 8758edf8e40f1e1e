"""What linear attention (Gated DeltaNet) takes, in decode steps and in prefill. Knows nothing about tables.

In a decode step it reads and writes states. Those of a benchmark that runs again and again stay in the GPU's cache as
long as they fit there; between two steps of a model all its weights pass through it. So the rate is that of states that
no cache holds, and the latency that of states so small that their bytes do not matter; what lies between is left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from clo.errors import ProfileError
from clo.kernel_tables import Floats
from clo.profile import Cost, ScanCost, Source, StreamCost
from clo.specs import LinearSpec
from clo_calibration.tables.measurements import (
    PACKAGE_VERSION,
    Samples,
    read_hardware,
    read_linear_decode,
    read_linear_prefill,
)

HEAD_DIM = 128
"""Width of keys and values of every model that was timed."""
SMALL_BYTES = 2.0**20
"""States that take next to no time, in a cache a microsecond at most."""
LARGE_BYTES = 3e8
"""States that no cache holds (128 MB on an RTX PRO 6000)."""
SHORTEST_PROMPT = 1024
OLDER_KERNEL = "fused_recurrent_gated_delta_rule"
"""Timed by a benchmark that hands states in as bfloat16 and gets them out as float32: three quarters of the bytes.

So says its published code for TensorRT-LLM; SGLang's is all that was timed on A100. On other GPUs the same kernel would
else be 1.2 to 1.3 times as fast as the one that engines run, above the memory's own rate on most.
"""


def linear_costs(gpu: str, data_root: Path | None = None) -> dict[str, Cost]:
    """Entries of a profile, by name; none of what was not timed on this GPU."""
    costs: dict[str, Cost] = {}
    bandwidth = read_hardware(gpu, data_root)["hbm_bytes_per_s"]
    try:
        costs["linear_attention"] = decode_cost(read_linear_decode(gpu, data_root), bandwidth)
        costs["prefill_linear_attention"] = prefill_cost(read_linear_prefill(gpu, data_root))
    except ProfileError:
        return costs
    return costs


def moved_bytes(points: Floats, *, narrow_in: bool = False) -> Floats:
    """Of a decode step's linear attention in one layer, as the schedule counts them; points as of `read_linear_decode`.

    States are float32 (`narrow_in`: but for those that are read), the rest is bfloat16.
    """
    return np.array([batch * _bytes(int(keys), int(values), narrow_in) for batch, keys, values in points])


def _bytes(key_heads: int, value_heads: int, narrow_in: bool) -> float:
    linear = LinearSpec(
        layers=(0,), num_key_heads=key_heads, num_value_heads=value_heads, key_dim=HEAD_DIM, value_dim=HEAD_DIM
    )
    return linear.step_bytes - (2.0 * linear.value_width * linear.key_dim if narrow_in else 0.0)


def decode_cost(samples: Samples, hbm_bytes_per_s: float) -> StreamCost:
    """`latency_s` from the smallest, `efficiency` from the largest, both as medians."""
    states = samples.points[:, 0] * samples.points[:, 2] * 4.0 * HEAD_DIM**2
    moved = moved_bytes(samples.points, narrow_in=OLDER_KERNEL in samples.labels["kernels"])
    small, large = states <= SMALL_BYTES, states >= LARGE_BYTES
    latency_s = float(np.median(samples.seconds[small]))
    rates = moved[large] / (samples.seconds[large] - latency_s)
    efficiency = min(1.0, float(np.median(rates)) / hbm_bytes_per_s)
    known = small | large
    foretold = latency_s + np.where(small, 0.0, moved) / (efficiency * hbm_bytes_per_s)
    errors = (foretold / samples.seconds - 1.0)[known]
    return StreamCost(
        source=Source.AICONFIGURATOR,
        note=_note(samples),
        samples=int(known.sum()),
        spread=round(float(np.sqrt(np.mean(errors**2))), 4),
        latency_s=latency_s,
        efficiency=round(efficiency, 4),
    )


def prefill_cost(samples: Samples) -> ScanCost:
    """Non-negative least squares on relative errors, over prompts that are not short."""
    chosen = samples.take(samples.points[:, 0] >= SHORTEST_PROMPT)
    tokens, _, heads = chosen.points.T
    features = np.stack([np.ones_like(tokens), tokens, tokens * heads], axis=1)
    found, _ = nnls(features / chosen.seconds[:, None], np.ones_like(tokens))
    errors = features @ found / chosen.seconds - 1.0
    latency_s, per_token_s, per_head_token_s = map(float, found)
    return ScanCost(
        source=Source.AICONFIGURATOR,
        note=f"{_note(chosen)}, prompts of {SHORTEST_PROMPT} tokens and more",
        samples=len(errors),
        spread=round(float(np.sqrt(np.mean(errors**2))), 4),
        latency_s=latency_s,
        per_token_s=per_token_s,
        per_head_token_s=per_head_token_s,
    )


def _note(samples: Samples) -> str:
    kernels = ", ".join(samples.labels["kernels"])
    return f"{kernels} of {samples.labels['framework_version']}, aiconfigurator-core {PACKAGE_VERSION}"
