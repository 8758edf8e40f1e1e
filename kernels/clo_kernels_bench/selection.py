"""The index path of a layer: hit test, scores, selection, resolve. Small kernels, one after another in a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from clo_kernels.hit_test import hit_test
from clo_kernels.layout import Resolved
from clo_kernels.page_index import IndexKind, entry_shape, hash_planes, page_index
from clo_kernels.recorded_calls import Call
from clo_kernels.resolve_pages import resolve_pages
from clo_kernels.score_pages import score_pages
from clo_kernels.select_pages import select_pages
from clo_kernels_bench import problems
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.peaks import Peaks
from clo_kernels_bench.problems import Sizes
from clo_kernels_bench.timing import copies_beyond_cache, graph_samples

LAYERS = 32
GOAL_US = 10.0
WARPS = (4, 16)
"""Of a program of `resolve_pages`, tried beside those that are used: fewer do less twice, more wait less."""
MAX_INDEXED_PAGES = 16 * 1024
"""An index of single tokens is made from all of its keys at once."""


class _Gate:
    """A layer whose first heads drift in every step and whose other heads do not."""

    def __init__(self, sizes: Sizes, miss_share: float) -> None:
        drifting = round(miss_share * sizes.kv_heads) * sizes.group
        self.query, self.tau = problems.random_query(sizes), torch.full((sizes.kv_heads,), 0.8, device=sizes.device)
        self.anchor = self.query.clone()
        self.turned = self.query.clone()
        self.turned[:, :drifting] *= -1
        self.missed = problems.everyone(sizes)

    def calls(self, steps: int = 2) -> list[Call]:
        """An even number of steps, there and back, so that the drifting heads miss in all."""
        queries = (self.turned, self.query) * (steps // 2)
        return [partial(hit_test, query, self.anchor, self.tau, out=self.missed) for query in queries]


class _Residency:
    """A layer's page table, and selections that go round: in the steady state each step fetches and evicts."""

    def __init__(self, sizes: Sizes, missed: torch.Tensor) -> None:
        self.table, self.chain, self.missed = problems.page_table(sizes), problems.selection_cycle(sizes), missed
        self.out = Resolved.like(self.chain[0])

    def calls(self, num_warps: int | None = None) -> list[Call]:
        """One for each selection."""
        return [
            partial(resolve_pages, selection, self.missed, self.table, out=self.out, num_warps=num_warps)
            for selection in self.chain
        ]

    def fetched(self) -> int:
        """Pages that a head that missed fetched in the last step. None, or room to spare, make a figure worthless."""
        missed = int(self.missed.sum())
        fetched = int(self.out.num_fetched.sum()) // max(1, missed)
        full = bool((self.table.page_of_slot[self.missed] >= 0).all())
        assert not missed or (fetched > 0 and full), f"resolve_pages: {fetched} pages fetched, slots full: {full}"
        return fetched


def resolve_figures(device: torch.device, *, quick: bool) -> Iterator[Figure]:
    """`hit_test` and `resolve_pages` of 32 layers in one graph, together and alone. Pages come and go in every step."""
    for batch in (1,) if quick else (1, 16):
        sizes = Sizes(device=device, batch=batch)
        for share in (0.25,) if quick else (0.0, 0.25, 1.0):
            case: dict[str, int | float] = {
                "batch": batch,
                "missed": share,
                "budget": sizes.budget,
                "slots": sizes.slots,
            }
            gated = [_Gate(sizes, share) for _ in range(LAYERS)]
            tables = [_Residency(sizes, gate.missed) for gate in gated]
            steps = len(tables[0].chain)
            layers = [
                list(zip(gate.calls(steps), table.calls(), strict=True))
                for gate, table in zip(gated, tables, strict=True)
            ]
            calls = [call for step in range(steps) for layer in layers for call in layer[step]]
            pair = tuple(2 * sample for sample in graph_samples(calls))
            fetching = case | {"fetched": tables[0].fetched()}
            figure = Figure(operation="hit_test + resolve_pages", case=fetching, samples_us=pair)
            yield replace(figure, limit_us=GOAL_US, limit="goal, a layer at batch 1") if batch == 1 else figure
            gates = [call for _ in range(LAYERS) for call in _Gate(sizes, share).calls()]
            yield Figure(operation="hit_test", case=case, samples_us=graph_samples(gates))
            mask = problems.everyone(sizes, missed=False)
            mask[:, : round(share * sizes.kv_heads)] = True
            tables = [_Residency(sizes, mask) for _ in range(LAYERS)]
            for warps in (None,) if quick or not share else (None, *WARPS):
                samples = graph_samples([call for table in tables for call in table.calls(warps)])
                tried = case | {"fetched": tables[0].fetched()} | ({} if warps is None else {"warps": warps})
                yield Figure(operation="resolve_pages", case=tried, samples_us=samples)


def selection_figures(device: torch.device, peaks: Peaks, *, quick: bool) -> Iterator[Figure]:
    """`score_pages` and `select_pages` with every head missed, at 8K to 64K pages; the budget is a tenth."""
    # scores lie in the cache of the device, as those that a step has just written do: its memory is no limit of theirs
    for thousand in (8, 64) if quick else (8, 16, 32, 64):
        num_pages = thousand * 1024
        sizes = Sizes(device=device, num_pages=num_pages, budget=num_pages // 10, slots=num_pages // 10)
        for kind in IndexKind:
            if kind.of_tokens and num_pages > MAX_INDEXED_PAGES:
                continue
            yield score_figure(sizes, kind, peaks)
        num_bytes = float(sizes.kv_heads * num_pages * 4)
        yield Figure(
            operation="select_pages",
            case={"pages": num_pages, "budget": sizes.budget},
            samples_us=graph_samples(_select_calls(sizes, 16)),
            num_bytes=num_bytes,
        )


def score_figure(sizes: Sizes, kind: IndexKind, peaks: Peaks) -> Figure:
    """`score_pages` by an index of this kind."""
    entry = math.prod(entry_shape(kind, sizes.page_size, sizes.head_dim))
    num_bytes = float(sizes.kv_heads * sizes.num_pages * entry * (4 if kind.of_tokens else sizes.dtype.itemsize))
    copies = copies_beyond_cache(num_bytes, sizes.device)
    return Figure(
        operation="score_pages",
        case={"index": str(kind), "pages": sizes.num_pages},
        samples_us=graph_samples(_score_calls(sizes, kind, copies)),
        num_bytes=num_bytes,
        limit_us=peaks.memory_us(num_bytes),
        limit=f"device memory, {peaks.hbm / 1e12:.2f} TB/s in this run",
    )


def _score_calls(sizes: Sizes, kind: IndexKind, copies: int) -> list[Call]:
    missed, counts = problems.everyone(sizes), problems.candidates(sizes)
    planes = hash_planes(sizes.head_dim).to(sizes.device) if kind is IndexKind.SIGN_HASH else None
    keys = torch.randn((*sizes.rows, sizes.num_pages, sizes.page_size, sizes.head_dim), device=sizes.device)
    first = page_index(keys if kind.of_tokens else keys.to(sizes.dtype), kind, planes)
    del keys

    def call() -> Call:
        query, index = problems.random_query(sizes), first.clone()
        return lambda: score_pages(query, index, counts, missed, planes=planes)

    return [call() for _ in range(copies)]


def _select_calls(sizes: Sizes, copies: int) -> list[Call]:
    missed, counts = problems.everyone(sizes), problems.candidates(sizes)

    def call() -> Call:
        # shares of a softmax, as score_pages writes them
        scores = (2 * torch.randn((*sizes.rows, sizes.num_pages), device=sizes.device)).softmax(-1)
        selection = problems.empty_selection(sizes)
        return lambda: select_pages(scores, counts, missed, selection)

    return [call() for _ in range(copies)]
