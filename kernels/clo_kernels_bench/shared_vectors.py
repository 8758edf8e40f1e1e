"""Vectors that are key and value in one, as large and shared by as many query heads as in DeepSeek-V3.

No goals: products of 128 query heads take about as long as an H200 takes to read what they are products of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from clo_kernels.hit_test import hit_test
from clo_kernels.page_index import IndexKind
from clo_kernels_bench import problems
from clo_kernels_bench.attention import attended_bytes, attention_calls, untimed
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.peaks import Peaks
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.selection import score_figure
from clo_kernels_bench.timing import copies_beyond_cache, graph_samples

KINDS = (IndexKind.PAGE_MINMAX, IndexKind.KEY_4BIT)


def shared_vector_figures(device: torch.device, peaks: Peaks, *, quick: bool) -> Iterator[Figure]:
    """A tenth of 131,072 tokens, by attention and all that chooses pages; slots of coded pages."""
    one = Sizes(device=device, kv_heads=1, group=128, head_dim=576, value_dim=512, slots=819)
    for batch, coded in ((1, False),) if quick else ((1, False), (16, False), (1, True)):
        sizes = replace(one, batch=batch, coded=coded)
        name = "attention over shared vectors" + (", coded" if coded else "")
        calls = attention_calls(sizes, copies_beyond_cache(attended_bytes(sizes), device))
        yield replace(untimed(name, sizes, peaks), samples_us=graph_samples(calls))
    query, missed = problems.random_query(one), problems.everyone(one)
    tau = torch.full((1,), 2.0, device=device)  # anchors move in every call
    gate = partial(hit_test, query, query.clone(), tau, out=missed)
    case = {"batch": 1, "group": one.group, "missed": 1.0}
    yield Figure(operation="hit_test over shared vectors", case=case, samples_us=graph_samples([gate]))
    for kind in KINDS[:1] if quick else KINDS:
        yield replace(score_figure(one, kind, peaks), operation="score_pages over shared vectors")
