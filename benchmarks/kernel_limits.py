"""How many measured points beat the HBM roofline, out of a warm L2 cache: the first limit in docs/kernel-costs.md.

Needs the measurements (`pip install "clo-offload[tables]"`).
"""

from __future__ import annotations

import numpy as np

from clo import presets
from clo.kernel_tables import KernelTable
from clo_calibration.tables.measurements import GPUS, Samples, read_decode_attention, read_gemm

SHAPE = (1, 32, 8, 128)
"""batch, query heads, KV heads, head_dim"""
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


def _beating(table: KernelTable, samples: Samples) -> str:
    ratio = table.roofline_seconds(*samples.points.T) / samples.seconds
    return f"{np.sum(ratio > 1)} ({np.mean(ratio > 1):.1%}), up to {ratio.max():.2f}x"


if __name__ == "__main__":
    main()
