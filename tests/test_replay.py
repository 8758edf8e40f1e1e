"""Cache policies over traces: worked out by hand, and against a slow step-by-step reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from histories import TAU, columns, history, paper_trace
from tiny import make_trace, random_trace, tiny_design, tiny_scene

from clo.trace import AttentionTrace
from clo_sim.replay import policy_of, replay


class TestByHand:
    """Hits, misses, diffs and evictions of every policy, head by head: A, B, C, D."""

    def test_without_cache_the_budget_moves_every_step(self) -> None:
        assert columns(history(paper_trace(), cache="none", slot_pages=None).demand_pages) == [[2, 2, 2, 2]] * 4

    def test_lru_with_slots_for_the_budget(self) -> None:
        # A: {9,10} -> 1,2 in; 3 in, 1 out; 1 in, 2 out; 2 in, 3 out
        # B: both there; 4 in, 9 out; 9 in, 10 out; both there
        # C: 1,2 in; 3 in, 1 out; both there; 5,6 in      D: 7,8 in, then there
        found = history(paper_trace(), cache="lru")
        assert columns(found.demand_pages) == [[2, 1, 1, 1], [0, 1, 1, 0], [2, 1, 0, 2], [2, 0, 0, 0]]
        assert columns(found.demand_missed) == [[1, 1, 1, 1]] * 4
        assert np.all(found.overlap == 1.0)

    def test_lru_with_one_slot_more(self) -> None:
        # A: {8,9,10} -> 1,2 in, 8,9 out; 3 in, 10 out; all there from here on
        # B: there; 4 in, 8 out; there; there
        # C: 1,2 in, 8,9 out; 3 in, 10 out; there; 5,6 in      D: 8 is there, 7 in; there
        found = history(paper_trace(), cache="lru", slot_pages=3)
        assert columns(found.demand_pages) == [[2, 1, 0, 0], [0, 1, 0, 0], [2, 1, 0, 2], [1, 0, 0, 0]]

    def test_head_reuse_fetching_the_difference(self) -> None:
        # A: no anchor, 1,2 in; 20 degrees, hit; 40 degrees, miss: 3 in for {3,1}; 40 from the new anchor: 2 in
        # B: no anchor, but both are there; three hits      C: 1,2 in; hit; 45 degrees: 3 in; hit
        # D: 7,8 in; three misses of 50 degrees that find both there
        found = history(paper_trace(), cache="head_reuse", tau=TAU)
        assert columns(found.demand_missed) == [[1, 0, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
        assert columns(found.demand_pages) == [[2, 0, 1, 1], [0, 0, 0, 0], [2, 0, 1, 0], [2, 0, 0, 0]]
        # A attends {1,2} when it would choose {2,3}; B keeps {9,10} for {10,4} and {9,4};
        # C keeps {1,2} for {2,3}, then {2,3} for {5,6}
        assert found.overlap.T.tolist() == [[1, 0.5, 1, 1], [1, 0.5, 0.5, 0.5], [1, 0.5, 1, 0], [1, 1, 1, 1]]

    def test_head_reuse_replacing_the_set(self) -> None:
        found = history(paper_trace(), cache="head_reuse", on_miss="replace", tau=TAU)
        assert columns(found.demand_pages) == [[2, 0, 2, 2], [2, 0, 0, 0], [2, 0, 2, 0], [2, 2, 2, 2]]

    def test_last_steps_selection_corrected_where_it_drifted(self) -> None:
        # A: on demand 1,2; attends {1,2} while 3 comes for the next step; attends {2,3}, 1 comes; 40 degrees: 2 in
        # B: on demand, nothing to fetch; attends {9,10} while 4 comes; attends {10,4}, 9 comes; attends {9,4}
        # C: on demand 1,2; 3 comes; 45 degrees: {2,3} on demand, there; 5,6 come for the next step
        # D: on demand 7,8, then on demand but there
        found = history(paper_trace(), cache="lru", prefetch_query="previous_step", tau=TAU)
        assert columns(found.demand_pages) == [[2, 0, 0, 1], [0, 0, 0, 0], [2, 0, 0, 0], [2, 0, 0, 0]]
        assert columns(found.spec_pages) == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 2], [0, 0, 0, 0]]
        assert columns(found.demand_missed) == [[1, 0, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]

    def test_exact_selection_after_a_prediction(self) -> None:
        # layer 0 has nothing below to predict from. C: predicted 1,5 in, then 2 in for 5; predicted {2,3}: 3 in for 1,
        # the real query agrees; predicted {2,4}: 4 in for 3, then 3 in for 4; predicted 5,6 in, agrees
        found = history(paper_trace(), cache="lru", prefetch_depth=1)
        assert columns(found.spec_pages) == [[0] * 4, [0] * 4, [2, 1, 1, 2], [2, 0, 0, 0]]
        assert columns(found.demand_pages) == [[2, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]

    def test_head_reuse_after_a_prediction(self) -> None:
        # C: no anchor: {1,5} in, anchor 10; real 0 is near. 50 is 40 off: {2,3} in, anchor 50; real 0 is 50 off: {2,3}
        # on demand, there, anchor 0. 45 is off: {2,4}: 4 in, anchor 45; real 45 is near. 0 is off: 5,6 in, anchor 0;
        # real 45 is off: {5,6} on demand, there.      D moves its anchor with every prediction and finds 7,8 there.
        found = history(paper_trace(), cache="head_reuse", prefetch_depth=1, tau=TAU)
        assert columns(found.spec_missed)[2:] == [[1, 1, 1, 1], [1, 1, 1, 1]]
        assert columns(found.spec_pages)[2:] == [[2, 2, 1, 2], [2, 0, 0, 0]]
        assert columns(found.demand_missed)[2:] == [[0, 1, 0, 1], [0, 0, 0, 0]]
        assert columns(found.demand_pages)[2:] == [[0, 0, 0, 0], [0, 0, 0, 0]]

    def test_prediction_without_a_cache_is_not_corrected(self) -> None:
        found = history(paper_trace(), cache="none", slot_pages=None, prefetch_depth=1)
        assert columns(found.spec_pages) == [[0] * 4, [0] * 4, [2] * 4, [2] * 4]
        assert columns(found.demand_pages) == [[2] * 4, [2] * 4, [0] * 4, [0] * 4]
        assert found.overlap[:, 2].tolist() == [0.5, 1.0, 0.5, 1.0]


class SlowHead:
    """One head's cache, page by page, written apart from the replay it is compared with."""

    def __init__(self, slots: int, newest: int) -> None:
        self.slots = slots
        # oldest first
        self.order = list(range(max(1, newest - slots + 1), newest + 1))

    def fetch(self, chosen: Sequence[int], whole: bool) -> int:
        missing = len(chosen) if whole else sum(page not in self.order for page in chosen)
        # the best page is the last to leave
        self.order = [page for page in self.order if page not in chosen] + list(reversed(chosen))
        self.order = self.order[-self.slots :]
        return missing


def slow_replay(trace: AttentionTrace, layer: int, head: int, policy: Any) -> dict[str, list[Any]]:
    """What one head does, step by step, by the rules of docs/design.md."""
    cache = SlowHead(policy.slot_pages, trace.header.num_candidate_pages(0))
    distance = policy.lookahead or 1
    real, ahead = trace.queries[:, layer, head], trace.lookahead_queries[distance][:, layer, head]
    pages = trace.pages["exact"][:, layer, head, : policy.budget_pages].tolist()
    ahead_pages = trace.lookahead_pages[("exact", distance)][:, layer, head, : policy.budget_pages].tolist()
    predicts = policy.lookahead and layer >= policy.lookahead
    anchor, held = None, set()
    result: dict[str, list[Any]] = {"spec": [], "demand": [], "spec_missed": [], "demand_missed": [], "overlap": []}
    for step in range(trace.header.num_steps):
        spec = demand = 0
        selects_ahead = False
        whole = policy.cache == "none" or policy.on_miss == "replace"

        def far(query: Any, anchor: Any = anchor) -> bool:
            return anchor is None or _cosine(query, anchor) < policy.tau

        if predicts and (policy.cache != "head_reuse" or far(ahead[step])):
            spec, anchor, selects_ahead = cache.fetch(ahead_pages[step], whole), ahead[step], True
            held = set(ahead_pages[step])
        decides = policy.cache == "lru" and not policy.speculates_last_step
        decides |= policy.cache == "none" and not predicts
        decides |= policy.gated and far(real[step], anchor)
        if decides:
            demand, anchor = cache.fetch(pages[step], whole), real[step]
            held = set(pages[step])
        result["overlap"].append(len(held & set(pages[step])) / len(pages[step]))
        if policy.speculates_last_step and not decides:
            spec, anchor, selects_ahead = cache.fetch(pages[step], whole), real[step], True
            held = set(pages[step])
        result["spec"].append(spec)
        result["demand"].append(demand)
        result["spec_missed"].append(selects_ahead)
        result["demand_missed"].append(bool(decides))
    return result


def _cosine(first: Any, second: Any) -> float:
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


POLICIES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none", "slot_pages": None},
    "none, predicted": {"cache": "none", "slot_pages": None, "prefetch_depth": 1},
    "lru": {"cache": "lru"},
    "lru, more slots": {"cache": "lru", "slot_pages": 7},
    "lru, predicted": {"cache": "lru", "prefetch_depth": 1, "slot_pages": 6},
    "reuse, diff": {"cache": "head_reuse", "tau": TAU},
    "reuse, diff, predicted, more slots": {"cache": "head_reuse", "tau": TAU, "prefetch_depth": 1, "slot_pages": 6},
    "reuse, replace, predicted": {"cache": "head_reuse", "on_miss": "replace", "tau": TAU, "prefetch_depth": 1},
    "none, predicted from two layers below": {"cache": "none", "slot_pages": None, "prefetch_depth": 2},
    "lru, predicted from two layers below": {"cache": "lru", "prefetch_depth": 2, "slot_pages": 5},
    "reuse, diff, predicted from two layers below": {"cache": "head_reuse", "tau": TAU, "prefetch_depth": 2},
    "last step": {"cache": "lru", "prefetch_query": "previous_step", "tau": TAU, "slot_pages": 6},
}


@pytest.mark.parametrize("changes", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("seed", range(6))
def test_against_the_slow_reference(changes: dict[str, Any], seed: int) -> None:
    trace = random_trace(seed, steps=12)
    plan = tiny_scene(trace).plan(tiny_design(4, **changes))
    policy = policy_of(plan, trace)
    found = replay(trace, policy)
    for layer, head in itertools.product(range(3), range(2)):
        slow, column = slow_replay(trace, layer, head, policy), layer * 2 + head
        assert found.spec_pages[:, column].tolist() == slow["spec"], (layer, head)
        assert found.demand_pages[:, column].tolist() == slow["demand"], (layer, head)
        assert found.spec_missed[:, column].tolist() == slow["spec_missed"], (layer, head)
        assert found.demand_missed[:, column].tolist() == slow["demand_missed"], (layer, head)
        assert found.overlap[:, column].tolist() == slow["overlap"], (layer, head)


@pytest.mark.parametrize("seed", range(3))
def test_a_gate_above_one_is_the_exact_cache(seed: int) -> None:
    trace = random_trace(seed)
    gate = history(trace, 4, cache="head_reuse", tau=1.5, slot_pages=6)
    exact = history(trace, 4, cache="lru", slot_pages=6)
    np.testing.assert_array_equal(gate.demand_pages, exact.demand_pages)
    assert np.all(gate.overlap == 1.0)


def test_a_gate_at_minus_one_selects_once() -> None:
    missed = history(random_trace(0), 4, cache="head_reuse", tau=-1.0).demand_missed
    assert missed[0].all()
    assert not missed[1:].any()


class TestFold:
    """Two query heads a group, 40 and 0 degrees from the anchor: cosines 0.766 and 1."""

    # mean 0.883, min 0.766; importance 3:1 in layer 0 gives 0.825, 1:3 in layer 1 gives 0.942 (traces hold queries as
    # bytes, so that thresholds keep a distance)
    @pytest.mark.parametrize(
        ("fold", "tau", "reused"),
        [
            ("mean", 0.85, [True, True]),
            ("mean", 0.91, [False, False]),
            ("min", 0.73, [True, True]),
            ("min", 0.80, [False, False]),
            ("importance", 0.79, [True, True]),
            ("importance", 0.88, [False, True]),
            ("importance", 0.97, [False, False]),
        ],
    )
    def test_a_group_decides_together(self, fold: str, tau: float, reused: list[bool]) -> None:
        trace = make_trace(
            [[[[1, 2]], [[1, 2]]], [[[1, 2]], [[1, 2]]]],
            angles=[[[0, 0], [0, 0]], [[40, 0], [40, 0]]],
            importance=[[3, 1], [1, 3]],
        )
        missed = history(trace, cache="head_reuse", gqa_fold=fold, tau=tau).demand_missed
        assert missed[0].all()
        assert (~missed[1]).tolist() == reused


def test_pages_that_prefill_left_leave_by_age_even_if_nobody_asks_for_them() -> None:
    # slots {8,9,10}, 8 the oldest: 1 drives out 8, which then has to come back
    trace = make_trace([[[[1]], [[1]]], [[[8]], [[8]]]])
    assert columns(history(trace, 1, cache="lru", slot_pages=3).demand_pages) == [[1, 1], [1, 1]]
