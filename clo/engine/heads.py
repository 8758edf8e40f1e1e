"""What a trace says about a model's heads: importance, similarity, prefetchability; and the settings that follow.

Knows nothing about tensors on devices or about how a design uses the settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clo import presets
from clo.errors import SpecError
from clo.similarity import Fold, stepwise
from clo.specs import Design, ModelSpec
from clo.thresholds import tau_by_importance, tau_for_hit_rate
from clo.trace import AttentionTrace
from clo.trace_stats import overlap

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeadProfile:
    """What was learnt about a model's heads beforehand. Layers by KV heads, and layers by query heads.

    `pinned` has the KV heads of each layer, first those to pin first; without it a design pins those of lowest number.
    `refresh_rate` replaces the gate by a clock, for comparison: the share of steps in which each head selects anew.
    """

    tau: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    pinned: tuple[tuple[int, ...], ...] = ()
    refresh_rate: float | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeadStatistics:
    """One row per layer. Means over the recorded steps."""

    importance: Floats
    """`[layers, query_heads]`: norm of what the head adds to the hidden state, over the mean head's."""
    similarity: Floats
    """`[layers, kv_heads]`: cosine of adjacent queries, mean over the group."""
    prefetchability: Floats
    """`[layers, kv_heads]`: share of a head's best pages that its query predicted one layer ahead finds (NaN: none)."""


def measure_heads(trace: AttentionTrace, *, budget_fraction: float = 0.1) -> HeadStatistics:
    """Statistics of every head of the recorded model, page sets at `budget_fraction` of the context."""
    header = trace.header
    unit = _unit(trace.queries)
    adjacent = np.einsum("slhd,slhd->slh", unit[1:], unit[:-1]).mean(axis=0)
    selector = header.selectors[-1]
    budget = max(1, min(header.max_budget_pages, round(budget_fraction * header.context_tokens / header.page_size)))
    ahead = np.full((header.num_layers, header.num_kv_heads), np.nan)
    if 1 in header.lookaheads:
        found = overlap(trace.pages[selector], trace.lookahead_pages[selector, 1], budget, header.universe + 1)
        ahead = np.asarray(found.mean(axis=0), dtype=np.float64).reshape(ahead.shape)
        ahead[: header.first_predicted(1)] = np.nan
    return HeadStatistics(
        importance=np.asarray(trace.head_importance, dtype=np.float64),
        similarity=adjacent.reshape(header.num_layers, header.num_kv_heads, -1).mean(axis=-1),
        prefetchability=ahead,
    )


def head_profile(trace: AttentionTrace, design: Design, model: ModelSpec) -> HeadProfile:
    """What `design` needs to know of `model`'s heads. Raises `SpecError` if the trace is of a model built differently.

    Tau per head reaches the design's target hit rate on the recorded queries, or grows with importance; pinned are the
    heads of each layer whose queries change most, which would move most.
    """
    import torch  # what is measured needs none

    header = trace.header
    shape = (header.num_layers, header.num_kv_heads, header.num_query_heads)
    wanted = (len(model.whole_layers), model.num_kv_heads, model.num_query_heads)
    if (*shape, header.places, header.layers_of_model) != (*wanted, model.whole_layers, model.num_layers):
        raise SpecError(
            f"head profile: the trace of {header.model} has {_counts(*shape, header.layers_of_model)}, {model.name} "
            f"has {_counts(*wanted, model.num_layers)}: record a trace of it (clo record) and give that: --trace, or "
            "heads = heads_for(design, model, trace)"
        )
    found = measure_heads(trace)
    tau = _thresholds(trace, design, found.importance)
    order = np.argsort(found.similarity, axis=1, kind="stable")

    def of_all(rows: NDArray[Any]) -> NDArray[Any]:
        """Layers that were not recorded, which never choose, have ones."""
        every = np.ones((model.num_layers, *rows.shape[1:]), dtype=rows.dtype)
        every[list(header.places)] = rows
        return every

    return HeadProfile(
        tau=None if tau is None else torch.tensor(of_all(tau), dtype=torch.float32),
        importance=torch.tensor(of_all(found.importance), dtype=torch.float32),
        pinned=tuple(tuple(int(head) for head in row) for row in of_all(order)),
    )


def _counts(recorded: int, kv_heads: int, query_heads: int, layers: int) -> str:
    whole = "" if recorded == layers else f", {recorded} of which keep the whole context"
    return f"{layers} layers{whole}, {kv_heads} KV and {query_heads} query heads"


def _thresholds(trace: AttentionTrace, design: Design, importance: Floats) -> Floats | None:
    """`[layers, kv_heads]`, those that the simulator replays with; none where all heads have the design's own."""
    header = trace.header
    if design.target_hit_rate is not None:
        queries, fold = stepwise(trace.queries, header.num_kv_heads), Fold(trace, design.gqa_fold)
        tau = tau_for_hit_rate(queries, fold, design.target_hit_rate)
        return tau.reshape(header.num_layers, header.num_kv_heads).astype(np.float64)
    if design.tau_by_head:
        return tau_by_importance(design.tau, design.tau_importance_power, importance, header.num_kv_heads)
    return None


def heads_for(design: Design, model: ModelSpec, trace: AttentionTrace | None = None) -> HeadProfile | None:
    """The head profile if `design` needs one: from `trace`, else from the shipped trace if that is of this model."""
    if not (design.tau_by_head or design.folds_by_importance or design.pinned_head_fraction):
        return None
    if model.indexer is not None:
        raise SpecError(
            f"design {design.name}: what it needs of heads comes from a recorded trace, and a model with an indexer of "
            "its own is not recorded: set design.gqa_fold = mean, target_hit_rate = none, pinned_head_fraction = 0"
        )
    return head_profile(trace or presets.load_trace(), design, model)


def _unit(queries: NDArray[np.float32]) -> Floats:
    wide = np.asarray(queries, dtype=np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12))
