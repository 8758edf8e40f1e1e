"""Statistics of an attention trace: how queries drift, how much page sets overlap, how often a set could be reused.

Plain averages over steps, layers and KV heads. Knows nothing about designs: what a miss costs is not its concern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clo.trace_file import NO_PAGE

if TYPE_CHECKING:
    from clo.trace import AttentionTrace

LAGS = (1, 4, 16, 64)
BUDGETS_PAGES = (8, 16, 32, 64)
TAUS = (0.6, 0.7, 0.8, 0.9, 0.95)
TABLE_TAU = 0.8

FloatArray = NDArray[np.float32]


def group_cosine(first: NDArray[Any], second: NDArray[Any], num_kv_heads: int) -> FloatArray:
    """Mean cosine of each KV head's query heads: [..., query heads, head_dim] twice to [..., KV heads].

    A zero vector has cosine 0 with every other.
    """
    product = np.einsum("...d,...d->...", first, second)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine = np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)
    grouped: FloatArray = cosine.reshape(*cosine.shape[:-1], num_kv_heads, -1).mean(-1)
    return grouped


def anchored_hits(queries: NDArray[Any], num_kv_heads: int, tau: float) -> NDArray[np.bool_]:
    """Whether each KV head is within `tau` of its anchor: [steps - 1, layers, KV heads].

    The first query is the first anchor; a miss makes the current query the anchor.
    """
    anchor = queries[0].copy()
    group_size = queries.shape[2] // num_kv_heads
    hits = np.zeros((len(queries) - 1, queries.shape[1], num_kv_heads), bool)
    for step, query in enumerate(queries[1:]):
        hits[step] = group_cosine(query, anchor, num_kv_heads) >= tau
        missed = np.repeat(~hits[step], group_size, axis=-1)
        anchor[missed] = query[missed]
    return hits


def overlap(first: NDArray[Any], second: NDArray[Any], budget_pages: int, num_pages: int) -> FloatArray:
    """Share of the best `budget_pages` of `first` that are among those of `second`: lists [..., k] to [...].

    `num_pages` is above every page id; padding is left out, and a list without pages gives 0.
    """
    chosen = _membership(first[..., :budget_pages], num_pages)
    shared = np.count_nonzero(chosen & _membership(second[..., :budget_pages], num_pages), axis=-1)
    share: FloatArray = (shared / np.maximum(1, np.count_nonzero(chosen, axis=-1))).astype(np.float32)
    return share


def _membership(lists: NDArray[Any], num_pages: int) -> NDArray[np.bool_]:
    # padding goes to column `num_pages`, which is cut off
    columns = np.where(lists == NO_PAGE, num_pages, lists).astype(np.intp)
    members = np.zeros((*lists.shape[:-1], num_pages + 1), bool)
    np.put_along_axis(members, columns, True, axis=-1)
    return members[..., :-1]


def describe(trace: AttentionTrace) -> dict[str, Any]:
    """Plain data: header, cosines by lag, overlaps by budget in pages, hit rates by tau, and a table by layer."""
    header = trace.header
    steps = header.num_steps
    # a list of all candidates is no choice
    most = min(header.max_budget_pages, header.num_candidate_pages(0) - 1)
    budgets = [budget for budget in BUDGETS_PAGES if budget <= most]
    return {
        "header": header.model_dump(mode="json"),
        "candidate_pages": [header.num_candidate_pages(0), header.num_candidate_pages(steps - 1)],
        "cosine_at_lag": {str(lag): _mean(_lag_cosine(trace, lag)) for lag in LAGS if lag < steps},
        "hit_rate_at_tau": {str(tau): _mean(_hits(trace, tau)) for tau in TAUS} if steps > 1 else {},
        "adjacent_overlap": {
            selector: {str(budget): _mean(_adjacent(trace, selector, budget)) for budget in budgets}
            for selector in (header.selectors if steps > 1 else ())
        },
        "overlap_with_exact": {
            selector: {str(budget): _mean(_with_exact(trace, selector, budget)) for budget in budgets}
            for selector in (header.selectors if "exact" in header.selectors else ())
            if selector != "exact"
        },
        "lookahead_cosine": {str(ahead): _mean(_lookahead_cosine(trace, ahead)) for ahead in header.lookaheads},
        "lookahead_overlap": {
            selector: {
                str(ahead): {
                    str(budget): _mean(_lookahead_overlap(trace, selector, ahead, budget)) for budget in budgets
                }
                for ahead in header.lookaheads
            }
            for selector in header.selectors
        },
        "attention_mass": {
            "resident": _mean(trace.resident_mass.astype(np.float32)),
            "best_pages": {str(budget): _best_mass(trace, budget) for budget in budgets},
        },
        "layers": _layer_table(trace, budgets[-1] if 32 not in budgets else 32) if budgets and steps > 1 else [],
    }


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def _lag_cosine(trace: AttentionTrace, lag: int) -> FloatArray:
    return group_cosine(trace.queries[lag:], trace.queries[:-lag], trace.header.num_kv_heads)


def _hits(trace: AttentionTrace, tau: float) -> NDArray[np.bool_]:
    return anchored_hits(trace.queries, trace.header.num_kv_heads, tau)


def _num_pages(trace: AttentionTrace) -> int:
    return trace.header.universe + 1


def _adjacent(trace: AttentionTrace, selector: str, budget: int) -> FloatArray:
    pages = trace.pages[selector]
    return overlap(pages[1:], pages[:-1], budget, _num_pages(trace))


def _with_exact(trace: AttentionTrace, selector: str, budget: int) -> FloatArray:
    return overlap(trace.pages["exact"], trace.pages[selector], budget, _num_pages(trace))


def _lookahead_cosine(trace: AttentionTrace, distance: int) -> FloatArray:
    known = slice(trace.header.first_predicted(distance), None)
    approximate = trace.lookahead_queries[distance]
    return group_cosine(trace.queries[:, known], approximate[:, known], trace.header.num_kv_heads)


def _lookahead_overlap(trace: AttentionTrace, selector: str, distance: int, budget: int) -> FloatArray:
    known = slice(trace.header.first_predicted(distance), None)
    approximate = trace.lookahead_pages[selector, distance]
    return overlap(trace.pages[selector][:, known], approximate[:, known], budget, _num_pages(trace))


def _best_mass(trace: AttentionTrace, budget: int) -> float | None:
    return None if trace.page_mass is None else _mean(trace.page_mass[..., :budget].sum(-1))


def _layer_table(trace: AttentionTrace, budget: int) -> list[dict[str, Any]]:
    header = trace.header
    columns = {
        "cosine_at_lag_1": _lag_cosine(trace, 1).mean((0, 2)),
        f"hit_rate_at_tau_{TABLE_TAU}": _hits(trace, TABLE_TAU).mean((0, 2)),
        "resident_mass": trace.resident_mass.astype(np.float32).mean((0, 2)),
    }
    for selector in header.selectors:
        columns[f"{selector}_adjacent_overlap_{budget}"] = _adjacent(trace, selector, budget).mean((0, 2))
        for ahead in header.lookaheads:
            values = _lookahead_overlap(trace, selector, ahead, budget).mean((0, 2))
            columns[f"{selector}_ahead_{ahead}_overlap_{budget}"] = np.pad(
                values, (header.num_layers - len(values), 0), constant_values=np.nan
            )
    return [
        {"layer": layer, **{name: _number(column[row]) for name, column in columns.items()}}
        for row, layer in enumerate(header.places)
    ]


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
