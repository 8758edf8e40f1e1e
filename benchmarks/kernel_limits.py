"""What the tables cannot say, as the limits in docs/kernel-costs.md have it.

How many measured points beat the HBM roofline, out of a warm L2 cache; what one query head per KV head costs where it
has a kernel of its own; how far off tables are past the tokens that they were fitted to.

Needs the measurements (`pip install "clo-offload[tables]"`).
"""

from __future__ import annotations

import numpy as np

from clo import presets
from clo.kernel_tables import KernelTable
from clo_calibration.tables.fit import (
    fit_decode_attention,
    fitted_groups,
    has_own_multi_head_kernel,
    multi_head_ratios,
)
from clo_calibration.tables.measurements import GPUS, Samples, read_decode_attention, read_gemm, read_hardware

SHAPE = (1, 32, 8, 128)
"""batch, query heads, KV heads, head_dim"""
PAST_EDGE = 32768
KV_TOKENS = (8192, 16384, 32768, 65536)


def main() -> None:
    print(f"| GPU | decode points | GEMM points |{''.join(f' {tokens} tokens, us |' for tokens in KV_TOKENS)}")
    for gpu in GPUS:
        profile, decode = presets.load_named_profile(gpu), read_decode_attention(gpu)
        beating = [_beating(profile.decode_attention, decode), _beating(profile.gemm, read_gemm(gpu))]
        times = dict(zip(map(tuple, decode.points.tolist()), decode.seconds.tolist(), strict=True))
        known = (times.get((*map(float, SHAPE), float(tokens))) for tokens in KV_TOKENS)
        cells = [*beating, *("-" if seconds is None else f"{seconds * 1e6:.0f}" for seconds in known)]
        print(f"| {gpu} | {' | '.join(cells)} |")
    print("\n| GPU | one query head over two, at most | priced over measured, p10, median, p90 |")
    for gpu in GPUS:
        print(f"| {gpu} | {' | '.join(_multi_head(gpu, read_decode_attention(gpu)))} |")
    print(f"\n| GPU | fitted below {PAST_EDGE} tokens, priced past it: median, p95 | off by over two |")
    for gpu in GPUS:
        print(f"| {gpu} | {' | '.join(_past_the_edge(gpu, read_decode_attention(gpu)))} |")


def _multi_head(gpu: str, samples: Samples) -> tuple[str, str]:
    """How much longer it takes, and how it is priced where the table leaves it out."""
    ratios = multi_head_ratios(samples)
    if not has_own_multi_head_kernel(samples):
        return f"{max(ratios):.1f}", "-"
    alone = samples.take(samples.points[:, 1] == samples.points[:, 2])
    priced = presets.load_named_profile(gpu).decode_attention.seconds(*alone.points.T) / alone.seconds
    return f"{max(ratios):.1f}", ", ".join(f"{ratio:.2f}" for ratio in np.quantile(priced, (0.1, 0.5, 0.9)))


def _past_the_edge(gpu: str, samples: Samples) -> tuple[str, str]:
    """Errors at 65536 tokens and more of a table that knows less than `PAST_EDGE`."""
    samples = fitted_groups(samples, 2 if has_own_multi_head_kernel(samples) else 1)
    tokens = samples.points[:, -1]
    table, _ = fit_decode_attention(samples.take(tokens < PAST_EDGE), read_hardware(gpu))
    past = samples.take(tokens > PAST_EDGE)
    ratios = table.seconds(*past.points.T) / past.seconds
    middle, high = np.quantile(ratios, (0.5, 0.95)) - 1
    return f"{middle:+.0%}, {high:+.0%}", f"{np.mean(np.abs(np.log2(ratios)) > 1):.0%}"


def _beating(table: KernelTable, samples: Samples) -> str:
    ratio = table.roofline_seconds(*samples.points.T) / samples.seconds
    return f"{np.sum(ratio > 1)} ({np.mean(ratio > 1):.1%}), up to {ratio.max():.2f}x"


if __name__ == "__main__":
    main()
