"""How far off the sum of an attention block's operations is from the whole block, measured: docs/kernel-costs.md.

From the hidden state to the hidden state: latent attention (DeepSeek-V3, vLLM), latent attention to what an indexer
chooses (DeepSeek-V3.2, three frameworks; GLM-5.2 in layers that share another's choice), and attention to the blocks
that one chooses (MiniMax-M3, vLLM and SGLang). Nothing was fitted to these measurements but, of vLLM's blocks with an
indexer, how they grow with the context, and of its MiniMax-M3 what the indexer takes beside that. Needs them
(`pip install "clo-offload[tables]"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from clo import presets
from clo.errors import ProfileError
from clo.kernel_tables import Floats
from clo.plan import make_plan
from clo.pricing import Pricer
from clo.schedule.machine import Op
from clo.schedule.ops import Stage, StepOps
from clo.specs import ModelSpec, Workload
from clo_calibration.tables.block_indexer import MODEL_HEADS
from clo_calibration.tables.indexer import DEEPSEEK, GLM_SHARING
from clo_calibration.tables.measurements import (
    BF16,
    BF16_CACHE,
    FP8,
    FP8_CACHE,
    GPUS,
    Cache,
    Samples,
    Weights,
    read_block_sparse,
    read_latent_modules,
    read_sparse_blocks,
)
from clo_sim.stand_in import TrafficSource

MOST_SEQUENCES = 64
MOST_TOKENS = 2**17 + 1
MANY_TOKENS = 2**19
"""Cached tokens in all from which on the GPU's work outlasts what launches it."""
WEIGHTS: dict[str, Weights] = {"bf16": BF16, "fp8": FP8}


@dataclass(frozen=True)
class Block:
    """One kind of block: whose, the model's shape, the design that does as it does, and its operations."""

    what: str
    model: ModelSpec
    design: str
    read: Callable[[str], Samples]
    operations: Callable[[StepOps], Iterable[Op]]


def _dense(ops: StepOps) -> Iterable[Op]:
    return (*ops.to_queries(0, 0), ops.append_kv(0), ops.dense_attention(0), *ops.to_hidden(0))


def _chosen(ops: StepOps) -> Iterable[Op]:
    chosen = ops.index_tokens(Stage.DEMAND, 0)
    return (*ops.to_queries(0, 0), ops.append_kv(0), chosen, ops.attention(0), *ops.to_hidden(0))


def _shared(ops: StepOps) -> Iterable[Op]:
    return (*ops.to_queries(0, 0), ops.append_kv(0), ops.attention(0), *ops.to_hidden(0))


def _one_layer(name: str, *, fp8: bool, kv_bytes: float = 2.0) -> ModelSpec:
    model = presets.load_model(name)
    every = {"shared_layers": (), "dense_layers": 0}
    indexer = None if model.indexer is None else model.indexer.with_fields(**every).model_dump()
    width = 1.0 if fp8 else 2.0
    return model.with_fields(
        num_layers=1, experts=None, weight_bytes_per_value=width, kv_bytes_per_value=kv_bytes, indexer=indexer
    )


def latent_blocks() -> Iterable[Block]:
    """DeepSeek-V3's, with weights of two widths."""
    for name, weights in WEIGHTS.items():
        model = _one_layer("deepseek-v3", fp8=name == "fp8")
        read = _latent(weights)
        yield Block(f"latent, vllm, {name} weights", model, "resident", read, _dense)


def _latent(weights: Weights) -> Callable[[str], Samples]:
    return lambda gpu: read_latent_modules(gpu, weights=weights)


def sparse_blocks() -> Iterable[Block]:
    """DeepSeek-V3.2's under three frameworks, and GLM-5.2's that share a choice, over caches of two widths."""
    for framework in ("sglang", "vllm", "trtllm"):
        for cache, kv_bytes in ((BF16_CACHE, 2.0), (FP8_CACHE, 1.0)):
            what = f"indexer, {framework}, {'bf16' if cache == BF16_CACHE else 'fp8'} cache"
            model = _one_layer("deepseek-v3.2", fp8=True, kv_bytes=kv_bytes)
            yield Block(what, model, "resident-sparse", _sparse(framework, DEEPSEEK, cache, indexer=True), _chosen)
    model = _one_layer("glm-5.2", fp8=True)
    read = _sparse("sglang", GLM_SHARING, BF16_CACHE, indexer=False)
    yield Block("shared choice, sglang, bf16 cache", model, "resident-sparse", read, _shared)


def _sparse(framework: str, model: str, cache: str, *, indexer: bool) -> Callable[[str], Samples]:
    return lambda gpu: read_sparse_blocks(gpu, framework, model, indexer=indexer, cache=cache)


def block_choices() -> Iterable[Block]:
    """MiniMax-M3's, over caches of two widths."""
    for framework in ("vllm", "sglang"):
        for cache, kv_bytes in ((BF16_CACHE, 2.0), (FP8_CACHE, 1.0)):
            what = f"indexer of blocks, {framework}, {'bf16' if cache == BF16_CACHE else 'fp8'} cache"
            model = _one_layer("minimax-m3", fp8=False, kv_bytes=kv_bytes)
            yield Block(what, model, "resident-sparse", _blocks(framework, cache), _chosen)


def _blocks(framework: str, cache: Cache) -> Callable[[str], Samples]:
    return lambda gpu: _one_new(read_block_sparse(gpu, framework, "generation", cache=cache))


def _one_new(samples: Samples) -> Samples:
    """Points (batch, heads, tokens): one new token after those before it, of the heads that the model has."""
    batch, heads, new, before = samples.points.T
    own = samples.take(np.isin(heads, MODEL_HEADS))
    points = np.stack([batch, heads, new + before], axis=1)[np.isin(heads, MODEL_HEADS)]
    return Samples(points=points, seconds=own.seconds, labels=own.labels)


def main() -> None:
    print("| GPU | block | shortest | sum over measured: median, p10 to p90 | from 524288 cached tokens on |")
    print("|---|---|---|---|---|")
    for block in (*latent_blocks(), *sparse_blocks(), *block_choices()):
        for gpu in GPUS:
            try:
                samples = block.read(gpu)
            except ProfileError:
                continue
            print(_row(gpu, block, samples))


def _row(gpu: str, block: Block, samples: Samples) -> str:
    batch, _, tokens = samples.points.T
    samples = samples.take((batch <= MOST_SEQUENCES) & (tokens <= MOST_TOKENS))
    ratios = _priced(gpu, block, samples) / samples.seconds
    many = samples.points[:, 0] * samples.points[:, 2] >= MANY_TOKENS
    shortest = f"{samples.seconds.min() * 1e6:.0f} us"
    return f"| {gpu} | {block.what} | {shortest} | {_spread(ratios)} | {_spread(ratios[many])} |"


def _spread(ratios: Floats) -> str:
    if not len(ratios):
        return ""
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9)) - 1
    return f"{middle:+.0%}, {low:+.0%} to {high:+.0%} ({len(ratios)})"


def _priced(gpu: str, block: Block, samples: Samples) -> Floats:
    machine, design = presets.load_machine(gpu), presets.load_design(block.design, block.model)
    pricer = Pricer(presets.load_named_profile(gpu), machine)
    models = {heads: _with_heads(block.model, int(heads)) for heads in np.unique(samples.points[:, 1])}
    source, sums = TrafficSource(presets.load_trace()), []
    for batch, heads, tokens in samples.points:
        load = Workload(context_tokens=int(tokens), batch=int(batch))
        plan = make_plan(models[heads], machine, design, load)
        ops, nothing_moves = StepOps(plan), source.traffic(plan)
        sums.append(sum(float(np.mean(pricer.seconds(op.work, nothing_moves))) for op in block.operations(ops)))
    return np.array(sums)


def _with_heads(model: ModelSpec, heads: int) -> ModelSpec:
    """The part of a model that has so many of its query heads, and all else whole."""
    if model.latent is not None:
        return model.with_fields(num_query_heads=heads)
    own = heads // model.group_size
    indexer = None if model.indexer is None else model.indexer.shard(own).model_dump()
    return model.with_fields(num_query_heads=heads, num_kv_heads=own, indexer=indexer)


if __name__ == "__main__":
    main()
