"""What mixtures of experts cost when tokens prefer some of them, and where times were borrowed: docs/kernel-costs.md.

Needs the measurements (`pip install "clo-offload[tables]"`). One token passes as many experts however tokens are sent,
so that what another GPU's times are off by can be seen there.
"""

from __future__ import annotations

import numpy as np

from clo import presets
from clo.kernel_scaling import scaled_seconds
from clo_calibration.tables.experts import EXPERTS, GPUS, HIDDEN, PER_TOKEN, TOKENS, WIDTH, sizes
from clo_calibration.tables.fit import EXPERTS_OF
from clo_calibration.tables.measurements import GPUS as MEASURED
from clo_calibration.tables.measurements import Samples, read_experts

NUM_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SKEWED = "power_law_1.2"


def main() -> None:
    print(f"| GPU |{''.join(f' {tokens} |' for tokens in NUM_TOKENS)}")
    for gpu in MEASURED:
        if gpu not in EXPERTS_OF:
            even, skewed = _by_point(read_experts(gpu)), _by_point(read_experts(gpu, routing=SKEWED))
            cells = (_ratio(even, skewed, tokens) for tokens in NUM_TOKENS)
            print(f"| {gpu} |{''.join(f' {cell:.2f} |' for cell in cells)}")
    for gpu, lender in EXPERTS_OF.items():
        print(f"{gpu}, one token, times of {lender} carried over: {_borrowed(gpu)}")


def _by_point(samples: Samples) -> dict[tuple[float, ...], float]:
    return dict(zip(map(tuple, samples.points.tolist()), samples.seconds.tolist(), strict=True))


def _ratio(even: dict[tuple[float, ...], float], skewed: dict[tuple[float, ...], float], tokens: int) -> float:
    common = [point for point in even.keys() & skewed.keys() if point[TOKENS] == tokens]
    return float(np.median([skewed[point] / even[point] for point in common]))


def _borrowed(gpu: str) -> str:
    table = presets.load_named_profile(gpu).experts
    assert table is not None
    samples = read_experts(gpu, routing=SKEWED)
    single = samples.take(samples.points[:, TOKENS] == 1)
    priced = scaled_seconds(table, presets.load_machine(gpu).gpu, *sizes(single.points).T)
    errors = np.abs(priced / single.seconds - 1)
    models = len(np.unique(single.points[:, [HIDDEN, WIDTH, PER_TOKEN, EXPERTS]], axis=0))
    shared = single.points[:, GPUS].max()
    return (
        f"off by {np.median(errors):.0%} in the median, {np.quantile(errors, 0.9):.0%} at p90 "
        f"({models} models on 1 to {shared:.0f} GPUs)"
    )


if __name__ == "__main__":
    main()
