"""A selector of your own, in simulation: a trace that holds its choices. Here the last few steps vote for pages.

A page scores 1 / (1 + rank) in the exact choice of each of the last `WINDOW` steps; the best scores are chosen. Steady
votes move fewer pages, and miss some of what the exact selector would have taken: both are printed.
"""

import numpy as np
from numpy.typing import NDArray

import clo_sim
from clo import presets
from clo.trace import NO_PAGE, AttentionTrace

WINDOW = 4


def voted(pages: NDArray[np.uint16], window: int) -> NDArray[np.uint16]:
    """The pages of `[steps, layers, KV heads, ranks]` that the last `window` steps vote for, best first."""
    steps, *heads, ranks = pages.shape
    num_pages = int(pages[pages != NO_PAGE].max()) + 1
    flat = pages.reshape(steps, -1, ranks).astype(np.int64)
    points = np.zeros((steps, flat.shape[1], num_pages + 1), dtype=np.float32)  # the last column: no page
    vote = (1 / (1 + np.arange(ranks))).astype(np.float32)
    np.put_along_axis(points, np.minimum(flat, num_pages), vote, axis=2)
    points[..., num_pages] = 0
    summed = np.stack([points[max(0, step + 1 - window) : step + 1].sum(axis=0) for step in range(steps)])
    best = np.argsort(-summed, axis=2, kind="stable")[:, :, :ranks]
    # a page without a vote is not chosen
    chosen = np.where(np.take_along_axis(summed, best, axis=2) > 0, best, NO_PAGE)
    return chosen.astype(np.uint16).reshape(steps, *heads, ranks)


def shared(mine: NDArray[np.uint16], exact: NDArray[np.uint16], budget: int) -> float:
    """Share of the exact selector's best pages that are among mine."""
    both = mine[..., :budget, None] == exact[..., None, :budget]
    return float(both.any(axis=-1).mean())


recorded = presets.load_trace()
header = recorded.header
# a trace may name any selector; the first one stands in for a design's that was not recorded
trace = AttentionTrace.from_arrays(
    header.with_fields(selectors=("voted",)),
    queries=recorded.queries,
    lookahead_queries=recorded.lookahead_queries,
    pages={"voted": voted(recorded.pages["exact"], WINDOW)},
    lookahead_pages={("voted", d): recorded.lookahead_pages[("exact", d)] for d in header.lookaheads},
    resident_mass=recorded.resident_mass,
    head_importance=recorded.head_importance,
)
design = presets.load_design("resolve").with_fields(slot_budgets=2)  # its index is priced as that of design.selector
for name, source in (("exact", clo_sim.TrafficSource(recorded)), ("voted", clo_sim.TrafficSource(trace))):
    result = clo_sim.simulate(clo_sim.make_scene(source=source), design)
    print(f"{name}: {result.tpot_s * 1e3:.1f} ms per token, {result.h2d_bytes_per_step / 1e9:.2f} GB a step")
kept = shared(trace.pages["voted"], recorded.pages["exact"], budget=26)
print(f"{kept:.0%} of the exact choice is among the voted one")
