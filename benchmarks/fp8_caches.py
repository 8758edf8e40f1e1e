"""What attention over an fp8 cache takes, over what it takes for as many bytes of a bf16 one: docs/kernel-costs.md.

From measurements of both (`pip install "clo-offload[tables]"`), where there is much to read. 1: bytes are all that
counts, 2: as slow as bf16.
"""

from __future__ import annotations

import numpy as np

from clo.errors import ProfileError
from clo_calibration.tables.fit import fitted_groups
from clo_calibration.tables.measurements import (
    FP8_CACHE,
    GPUS,
    Samples,
    latent_attention_samples,
    read_decode_attention,
    read_latent_columns,
)

MANY_ROWS = 2**20
"""Rows of keys, or vectors, of all sequences and KV heads."""


def main() -> None:
    print("| GPU | keys and values | latent attention, TensorRT-LLM | latent attention, SGLang |")
    for gpu in GPUS:
        print(f"| {gpu} | {_heads(gpu)} | {_latent(gpu, 'trtllm')} | {_latent(gpu, 'sglang')} |")


def _heads(gpu: str) -> str:
    try:
        wide, narrow = read_decode_attention(gpu), read_decode_attention(gpu, cache=FP8_CACHE)
    except ProfileError:
        return "-"
    return _ratio(fitted_groups(wide, 2), fitted_groups(narrow, 2), rows=(0, 2, 4))


def _latent(gpu: str, framework: str) -> str:
    try:
        columns = read_latent_columns(gpu, framework)
        wide, narrow = (latent_attention_samples(columns, framework, cache) for cache in ("bfloat16", FP8_CACHE))
    except ProfileError:
        return "-"
    return _ratio(wide, narrow, rows=(0, 2))


def _ratio(wide: Samples, narrow: Samples, rows: tuple[int, ...]) -> str:
    """Median, p10 to p90 of what fp8 takes over bf16 with half the tokens, the last of the sizes."""
    times = dict(zip(map(tuple, wide.points.tolist()), wide.seconds.tolist(), strict=True))
    many = np.prod(narrow.points[:, rows], axis=1) >= MANY_ROWS
    chosen = narrow.take(many)
    halves = chosen.points * ([1.0] * (chosen.points.shape[1] - 1) + [0.5])
    pairs = [(times.get(tuple(half)), taken) for half, taken in zip(halves.tolist(), chosen.seconds, strict=True)]
    ratios = np.array([taken / half for half, taken in pairs if half is not None])
    low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
    return f"{middle:.2f}, {low:.2f} to {high:.2f} ({len(ratios)})"


if __name__ == "__main__":
    main()
