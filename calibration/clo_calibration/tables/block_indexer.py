"""What MiniMax-M3's indexer of blocks takes, and attention of a prompt to what it chose.

Both were timed within whole attention blocks, from the hidden state to the hidden state with all projections. In a
decode step the scan is how such a block grows with the context once it attends to no more tokens; what the indexer
takes beside it is what a block leaves of its other parts, priced by this GPU's tables. In prefill scores are how
SGLang's block grows with the tokens before a chunk (nobody else's was timed behind long prefixes), and attention is
what they and the GEMMs leave of vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from clo.errors import ProfileError
from clo.kernel_tables import DecodeAttentionTable, Floats, GemmTable, KernelTable
from clo.profile import ArithmeticCost, Cost, IndexerCost, Source
from clo_calibration.tables.measurements import PACKAGE_VERSION, Samples, read_block_sparse, read_hardware

HIDDEN, HEAD_DIM, GROUP = 6144, 128, 16
"""Of MiniMax-M3: width of the hidden state and of a head, query heads that share a KV head."""
KEY_BYTES, TOP_TOKENS = 256.0, 2048
MODEL_HEADS = (16, 32, 64)
"""Query heads of its blocks on 4, 2 and 1 GPUs. Fewer fill kernels of prefill badly, more it does not have."""
LARGE_BYTES = 1e8
"""Keys that stay in no cache from one run to the next."""
NOISE_S = 1e-5
"""How far off the difference of two timed blocks is, whatever its size."""
FEWEST_NEW, SHORTEST_PREFIX, SHORTEST_S = 4096, 4096, 2e-4
"""New tokens, tokens before them, and time, from which on a prefill kernel fills the GPU."""


def block_indexer_costs(gpu: str, tables: Mapping[str, KernelTable], data_root: Path | None = None) -> dict[str, Cost]:
    """Entries of a profile with such `tables`, by name; none of what was not timed on this GPU."""
    gemm, attention = tables["gemm"], tables["decode_attention"]
    assert isinstance(gemm, GemmTable)
    assert isinstance(attention, DecodeAttentionTable)
    hardware, costs = read_hardware(gpu, data_root), dict[str, Cost]()
    try:
        blocks = read_block_sparse(gpu, "vllm", "generation", data_root)
        costs["block_indexer"] = decode_cost(blocks, gemm, attention, hardware["hbm_bytes_per_s"])
        prompts = read_block_sparse(gpu, "vllm", "context", data_root)
        chunks = read_block_sparse(gpu, "sglang", "context", data_root)
    except ProfileError:
        return costs
    rate = hardware["flops_per_s"]
    costs["prefill_block_indexer"] = score_cost(chunks, rate)
    costs["prefill_block_attention"] = attention_cost(prompts, gemm, costs["prefill_block_indexer"], rate)
    return costs


def kv_heads(heads: Floats) -> Floats:
    """KV heads, and heads of the indexer, of a block with so many query heads."""
    return np.maximum(1.0, heads / GROUP)


def decode_cost(
    blocks: Samples, gemm: GemmTable, attention: DecodeAttentionTable, hbm_bytes_per_s: float
) -> IndexerCost:
    """Points are (batch, heads, new tokens, tokens before). Scans by least squares, then `latency_s` as a median."""
    batch, more, seconds = _scans(blocks)
    scanned = batch * more * KEY_BYTES
    large = scanned >= LARGE_BYTES
    features = np.stack([more, scanned], axis=1)[large]
    weights = 1.0 / (seconds[large] + NOISE_S)
    found, _ = nnls(features * weights[:, None], seconds[large] * weights)
    errors = features @ found / seconds[large] - 1.0
    per_token_s, per_byte_s = map(float, found)
    batch, heads, _, before = blocks.points.T
    first = (before > TOP_TOKENS) & (before <= 2 * TOP_TOKENS) & np.isin(heads, MODEL_HEADS)
    first &= batch * before * KEY_BYTES < LARGE_BYTES
    batch, heads, before = batch[first], heads[first], before[first]
    others = _projections_s(gemm, batch, heads) + attention.seconds(
        batch, heads, kv_heads(heads), np.full_like(heads, HEAD_DIM), np.full_like(heads, TOP_TOKENS)
    )
    left = blocks.seconds[first] - others - before * (per_token_s + batch * KEY_BYTES * per_byte_s)
    return IndexerCost(
        source=Source.AICONFIGURATOR,
        note=f"attention blocks of {blocks.labels['framework_version']}, aiconfigurator-core {PACKAGE_VERSION}",
        samples=len(errors) + len(left),
        spread=round(float(np.sqrt(np.mean(errors**2))), 4),
        latency_s=max(0.0, float(np.median(left))),
        per_token_s=per_token_s,
        efficiency=round(min(1.0, 1.0 / (per_byte_s * hbm_bytes_per_s)), 4),
    )


def _scans(blocks: Samples) -> tuple[Floats, Floats, Floats]:
    """Batch, more tokens and more time, against the same block over the fewest tokens that are more than it chooses."""
    _, inverse = np.unique(blocks.points[:, :3], axis=0, return_inverse=True)
    found = []
    for group in range(inverse.max() + 1):
        of_group = (inverse.reshape(-1) == group) & (blocks.points[:, 3] > TOP_TOKENS)
        points, seconds = blocks.points[of_group], blocks.seconds[of_group]
        more = points[:, 3] - points[:, 3].min(initial=np.inf)
        found.append(np.stack([points[:, 0], more, seconds - seconds[more == 0].sum()], axis=1)[more > 0])
    batch, more, seconds = np.concatenate(found).T
    return batch, more, seconds


def score_cost(chunks: Samples, flops_per_s: float) -> ArithmeticCost:
    """The median share of the datasheet bf16 rate at which a chunk's tokens score those before it."""
    chunks = _full(chunks)
    batch, heads, new, before = chunks.points.T
    _, inverse = np.unique(chunks.points[:, :3], axis=0, return_inverse=True)
    shares = []
    for group in range(inverse.max() + 1):
        of_group = np.flatnonzero((inverse.reshape(-1) == group) & (before >= SHORTEST_PREFIX))
        if not len(of_group):
            continue
        start = of_group[np.argmin(before[of_group])]
        more_s = chunks.seconds[of_group] - chunks.seconds[start]
        pairs = batch[start] * new[start] * (before[of_group] - before[start])
        long = more_s >= SHORTEST_S
        shares.extend(2.0 * HEAD_DIM * kv_heads(heads[start]) * pairs[long] / more_s[long] / flops_per_s)
    return _arithmetic(chunks, np.array(shares), f"behind {SHORTEST_PREFIX} tokens and more")


def attention_cost(prompts: Samples, gemm: GemmTable, scores: Cost, flops_per_s: float) -> ArithmeticCost:
    """The median share of that rate at which a prompt's tokens attend to what was chosen for them."""
    assert isinstance(scores, ArithmeticCost)
    prompts = _full(prompts)
    batch, heads, new, before = prompts.points.T
    scored = 2.0 * HEAD_DIM * kv_heads(heads) * batch * new * (before + new / 2)
    left = prompts.seconds - _projections_s(gemm, batch * new, heads) - scored / (scores.efficiency * flops_per_s)
    alone = np.clip(TOP_TOKENS - before, 0.0, new)
    pairs = batch * (alone * (before + alone / 2) + TOP_TOKENS * (new - alone))
    enough = left >= SHORTEST_S
    shares = 4.0 * HEAD_DIM * (heads * pairs)[enough] / left[enough] / flops_per_s
    return _arithmetic(prompts, shares, "what scores and GEMMs leave")


def _full(samples: Samples) -> Samples:
    """Of those that the model has, chunks that fill the GPU and hold more than is chosen."""
    batch, heads, new, _ = samples.points.T
    return samples.take(np.isin(heads, MODEL_HEADS) & (batch * new >= FEWEST_NEW) & (new > TOP_TOKENS))


def _projections_s(gemm: GemmTable, rows: Floats, heads: Floats) -> Floats:
    """Queries, keys and values with the indexer's in one, and the output projection."""
    own = kv_heads(heads)
    width = (heads + 2 * own + own + 1) * HEAD_DIM
    hidden = np.full_like(rows, HIDDEN)
    return np.asarray(gemm.seconds(rows, width, hidden) + gemm.seconds(rows, hidden, heads * HEAD_DIM))


def _arithmetic(samples: Samples, shares: Floats, note: str) -> ArithmeticCost:
    kernels = ", ".join(samples.labels["kernels"])
    return ArithmeticCost(
        source=Source.AICONFIGURATOR,
        note=f"{kernels} of {samples.labels['framework_version']}, {note}, aiconfigurator-core {PACKAGE_VERSION}",
        samples=len(shares),
        efficiency=round(min(1.0, float(np.median(shares))), 4),
        spread=round(float(shares.std() / shares.mean()), 4),
    )
