"""What the indexer of DeepSeek Sparse Attention takes, in decode steps and in prefill. Knows nothing about tables.

In a decode step it was only timed within whole attention blocks. What it takes beside the scan: how much longer a block
takes that has one than a block that shares another's choice (SGLang, GLM-5 and GLM-5.2). The scan: how a block grows
with the context once it attends to no more tokens (vLLM, up to 1,024 sequences).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from clo.errors import ProfileError
from clo.kernel_tables import Floats
from clo.profile import ArithmeticCost, Cost, IndexerCost, Source
from clo_calibration.tables.measurements import (
    BF16,
    BF16_CACHE,
    FP8,
    FP8_CACHE,
    PACKAGE_VERSION,
    Samples,
    read_hardware,
    read_sparse_blocks,
    read_sparse_prefill,
)

DEEPSEEK, GLM, GLM_FP8, GLM_SHARING = (
    "deepseek-ai/DeepSeek-V3.2",
    "zai-org/GLM-5",
    "zai-org/GLM-5-FP8",
    "zai-org/GLM-5.2-FP8",
)
KEY_BYTES = 132.0
TOP_TOKENS = 2048
NOISE_S = 1e-5
"""How far off the difference of two timed blocks is, whatever its size."""
FEWEST_NEW, SHORTEST_S = 4096, 2e-4
"""New tokens, and time, from which on a prefill kernel fills the GPU."""
BORROWED = {"gb200": "b200"}
"""GPUs on which too little was timed, by the one whose costs they borrow."""
GLM_HEADS, GLM_INDEX_WIDTH, VECTOR_DIM, KV_RANK = 64, 32 * 128, 576, 512


def indexer_costs(gpu: str, data_root: Path | None = None) -> dict[str, Cost]:
    """Entries of a profile, by name; none for a GPU on which no such model was timed."""
    if gpu in BORROWED:
        borrowed = indexer_costs(BORROWED[gpu], data_root)
        return {
            name: cost.with_fields(source=Source.ASSUMED, note=f"as on {BORROWED[gpu]}: {cost.note}", spread=0.0)
            for name, cost in borrowed.items()
        }
    try:
        scans = scan_samples(gpu, data_root)
    except ProfileError:
        return {}
    hardware = read_hardware(gpu, data_root)
    rate, bandwidth = hardware["flops_per_s"], hardware["hbm_bytes_per_s"]
    return {
        "indexer": decode_cost(scans, beside_scan(gpu, data_root), bandwidth),
        "prefill_indexer": prefill_cost(
            read_sparse_prefill(gpu, "glm5_mqa_logits", data_root), 2.0 * GLM_INDEX_WIDTH, None, rate
        ),
        "prefill_chosen_attention": prefill_cost(
            read_sparse_prefill(gpu, "glm5_dsa_attn", data_root),
            2.0 * GLM_HEADS * (VECTOR_DIM + KV_RANK),
            TOP_TOKENS,
            rate,
        ),
    }


def scan_samples(gpu: str, data_root: Path | None = None) -> Samples:
    """How much longer a block takes than over `TOP_TOKENS` tokens: points are (batch, more tokens)."""
    found: dict[tuple[float, float], list[float]] = {}
    for model in (DEEPSEEK, GLM):
        for weights, cache in ((FP8, FP8_CACHE), (FP8, BF16_CACHE), (BF16, BF16_CACHE)):
            blocks = read_sparse_blocks(gpu, "vllm", model, data_root, weights=weights, cache=cache)
            _differences(blocks, found)
    points = np.array(sorted(found))
    seconds = np.array([np.median(found[batch, tokens]) for batch, tokens in points])
    return Samples(points=points, seconds=seconds, labels=blocks.labels)


def _differences(blocks: Samples, found: dict[tuple[float, float], list[float]]) -> None:
    """Of one model's blocks, whatever the attention heads: the indexer's work does not depend on them."""
    timed = _by_point(blocks)
    least = {(batch, heads): tokens for batch, heads, tokens in sorted(timed, reverse=True) if tokens > TOP_TOKENS}
    for (batch, heads, tokens), seconds in timed.items():
        first = least.get((batch, heads), tokens)
        if tokens > first:
            found.setdefault((batch, tokens - first), []).append(seconds - timed[batch, heads, first])


def beside_scan(gpu: str, data_root: Path | None = None) -> Samples:
    """How much longer a block with an indexer takes than one without: points are (batch, heads, tokens)."""
    blocks = read_sparse_blocks(gpu, "sglang", GLM_FP8, data_root)
    own = _by_point(blocks)
    others = _by_point(read_sparse_blocks(gpu, "sglang", GLM_SHARING, data_root, indexer=False))
    points = [point for point in own if point in others and point[2] > TOP_TOKENS]
    seconds = [own[point] - others[point] for point in points]
    return Samples(points=np.array(points), seconds=np.array(seconds), labels=blocks.labels)


def _by_point(samples: Samples) -> dict[tuple[float, ...], float]:
    return dict(zip(map(tuple, samples.points.tolist()), samples.seconds.tolist(), strict=True))


def decode_cost(scans: Samples, beside: Samples, hbm_bytes_per_s: float) -> IndexerCost:
    """`per_token_s` and `efficiency` from the scans, then `latency_s` as the median of what those leave."""
    batch, tokens = scans.points.T
    # beyond the first tokens other kernels rank them, which take longer whatever there is to rank
    features = np.stack([np.ones_like(tokens), tokens, batch * tokens * KEY_BYTES], axis=1)
    weights = 1.0 / (scans.seconds + NOISE_S)
    found, _ = nnls(features * weights[:, None], scans.seconds * weights)
    _, per_token_s, per_byte_s = found
    batch, _, tokens = beside.points.T
    left = beside.seconds - tokens * per_token_s - batch * tokens * KEY_BYTES * per_byte_s
    errors = features @ found / scans.seconds - 1.0
    large = scans.seconds > 2 * NOISE_S
    return IndexerCost(
        source=Source.AICONFIGURATOR,
        note=f"differences of attention blocks of {scans.labels['framework_version']} and "
        f"{beside.labels['framework_version']}, aiconfigurator-core {PACKAGE_VERSION}",
        samples=len(left) + len(errors),
        spread=round(float(np.sqrt(np.mean(errors[large] ** 2))), 4),
        latency_s=float(np.median(left)),
        per_token_s=float(per_token_s),
        efficiency=round(min(1.0, 1.0 / (per_byte_s * hbm_bytes_per_s)), 4),
    )


def prefill_cost(samples: Samples, pair_flops: float, most: int | None, flops_per_s: float) -> ArithmeticCost:
    """The median share of the datasheet bf16 rate; a token attends to `most` of those before it, or to all."""
    new = samples.points[:, 0] * samples.points[:, 1]
    chosen = samples.take((new >= FEWEST_NEW) & (samples.seconds >= SHORTEST_S))
    if most is not None:
        # the kernel takes as long for a token with fewer before it: only full ones tell its rate
        chosen = chosen.take(chosen.points[:, 2] >= most)
    shares = pair_flops * _pairs(chosen.points, most) / chosen.seconds / flops_per_s
    return ArithmeticCost(
        source=Source.AICONFIGURATOR,
        note=f"{', '.join(chosen.labels['kernels'])} of {chosen.labels['framework_version']}, aiconfigurator-core "
        f"{PACKAGE_VERSION}, {FEWEST_NEW} new tokens and more",
        samples=len(shares),
        efficiency=round(min(1.0, float(np.median(shares))), 4),
        spread=round(float(shares.std() / shares.mean()), 4),
    )


def _pairs(points: Floats, most: int | None) -> Floats:
    sequences, new, before = points.T
    return np.asarray(sequences * new * (before + 0.5 * new if most is None else most))
