"""What a layer does to one token beside its large operations, in one launch each, and as the library does it in many.

What the difference is worth in a step: twice that of a norm and once that of a rotation, times the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from clo_kernels import reference
from clo_kernels.rotate import rotate
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.timing import graph_samples

LAYERS = 32
EPSILON = 1e-5


def small_operation_figures(device: torch.device, *, quick: bool) -> Iterator[Figure]:
    """Of one of 32 layers in a graph, with as many heads as in Llama-3-8B."""
    for batch in (1,) if quick else (1, 16):
        sizes = Sizes(device=device, batch=batch)
        for name, call in _calls(sizes).items():
            yield Figure(operation=name, case={"batch": batch}, samples_us=graph_samples([call] * LAYERS))


def library_norm(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An RMS norm as modules of `transformers` compute it."""
    exact = hidden.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * normed.to(hidden.dtype)


def _calls(sizes: Sizes) -> dict[str, Callable[[], object]]:
    query = problems.random_query(sizes)
    key = torch.randn((*sizes.rows, sizes.head_dim), device=sizes.device).to(sizes.dtype)
    angles = torch.rand(sizes.batch, sizes.head_dim, device=sizes.device)
    given = query, key, angles.cos().to(sizes.dtype), angles.sin().to(sizes.dtype)
    outs = {"out_query": torch.empty_like(query), "out_key": torch.empty_like(key)}
    hidden = query.view(sizes.batch, 1, -1)
    weight = torch.rand_like(hidden[0, 0])
    return {
        "rotate": partial(rotate, *given, **outs),
        "rotate, as torch operations": partial(reference.rotate, *given, **outs),
        "RMS norm": partial(torch.nn.functional.rms_norm, hidden, weight.shape, weight, EPSILON),
        "RMS norm, as torch operations": partial(library_norm, hidden, weight),
    }
