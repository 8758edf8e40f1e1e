"""Times of the references on a CPU, at small sizes: what a run without a GPU can say, and nothing about one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from clo_kernels_bench.correctness import cases
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.timing import host_samples

NOTE = "no CUDA device: the plain-torch references ran on the CPU at small sizes; no figure here says anything of a GPU"


def reference_figures(*, quick: bool) -> Iterator[Figure]:
    """One figure an operation."""
    sizes = Sizes(
        device=torch.device("cpu"), kv_heads=2, head_dim=64, num_pages=256, budget=25, slots=50, dtype=torch.float32
    )
    for name, (operation, arguments) in cases(sizes).items():
        samples = host_samples(partial(operation, **arguments), calls=1, repeats=3 if quick else 10)
        yield Figure(operation=name, case={"runs": "reference", "pages": sizes.num_pages}, samples_us=samples)
