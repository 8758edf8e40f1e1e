"""How far off the sum of an attention block's operations is from the whole block, measured: docs/kernel-costs.md.

DeepSeek-V3's block from the hidden state to the hidden state, with 1 to 128 heads on the GPU, as vLLM runs it. Nothing
was fitted to these measurements. Needs them (`pip install "clo-offload[tables]"`).
"""

from __future__ import annotations

import numpy as np

from clo import presets
from clo.errors import ProfileError
from clo.kernel_tables import Floats
from clo.plan import make_plan
from clo.pricing import Pricer
from clo.schedule.ops import StepOps
from clo.specs import Workload
from clo_calibration.tables.measurements import BF16, FP8, GPUS, Samples, Weights, read_latent_modules
from clo_sim.stand_in import TrafficSource

MOST_SEQUENCES = 64
MOST_TOKENS = 2**17 + 1
MANY_TOKENS = 2**19
"""Cached tokens in all from which on the GPU's work outlasts what launches it."""
WEIGHTS: dict[str, Weights] = {"bf16": BF16, "fp8": FP8}


def main() -> None:
    print("| GPU | weights | shortest block | median, p10 to p90 | the same, from 524288 cached tokens on |")
    for gpu in GPUS:
        for name, weights in WEIGHTS.items():
            try:
                samples = read_latent_modules(gpu, weights=weights)
            except ProfileError:
                continue
            samples = samples.take((samples.points[:, 0] <= MOST_SEQUENCES) & (samples.points[:, 2] <= MOST_TOKENS))
            ratios = _priced(gpu, samples, fp8=name == "fp8") / samples.seconds
            many = samples.points[:, 0] * samples.points[:, 2] >= MANY_TOKENS
            shortest = f"{samples.seconds.min() * 1e6:.0f} us"
            print(f"| {gpu} | {name} | {shortest} | {_spread(ratios)} | {_spread(ratios[many])} |")


def _spread(ratios: Floats) -> str:
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9)) - 1
    return f"{middle:+.0%}, {low:+.0%} to {high:+.0%} ({len(ratios)})"


def _priced(gpu: str, samples: Samples, *, fp8: bool) -> Floats:
    machine, design = presets.load_machine(gpu), presets.load_design("resident")
    pricer, width = Pricer(presets.load_named_profile(gpu), machine), 1.0 if fp8 else 2.0
    shape = presets.load_model("deepseek-v3").with_fields(num_layers=1, experts=None, weight_bytes_per_value=width)
    models = {heads: shape.with_fields(num_query_heads=int(heads)) for heads in np.unique(samples.points[:, 1])}
    source, sums = TrafficSource(presets.load_trace()), []
    for batch, heads, tokens in samples.points:
        load = Workload(context_tokens=int(tokens), batch=int(batch))
        plan = make_plan(models[heads], machine, design, load)
        ops, nothing_moves = StepOps(plan), source.traffic(plan)
        block = (*ops.to_queries(0, 0), ops.append_kv(0), ops.dense_attention(0), *ops.to_hidden(0))
        sums.append(sum(float(pricer.seconds(op.work, nothing_moves)) for op in block))
    return np.array(sums)


if __name__ == "__main__":
    main()
