"""Cache policies over traces: worked out by hand, against a slow step-by-step reference, and against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny import make_trace, random_trace, tiny_design, tiny_scene

from clo.plan import make_plan
from clo.thresholds import tau_by_importance
from clo.trace import AttentionTrace
from clo.traffic import Traffic
from clo_sim.replay import HeadHistory, fewest_pages, policy_of, replay
from clo_sim.similarity import Fold, anchored_hit_rate, stepwise, tau_for_hit_rate
from clo_sim.stand_in import TrafficSource

TAU = math.cos(math.radians(30))
"""Queries within 30 degrees of the anchor are hits."""

# four steps, two layers of two heads; pages 1 to 10 are candidates, prefill leaves the last ones in the slots
A = [[1, 2], [2, 3], [3, 1], [1, 2]]
B = [[9, 10], [10, 4], [9, 4], [9, 4]]
C = [[1, 2], [2, 3], [2, 3], [5, 6]]
D = [[7, 8], [7, 8], [7, 8], [7, 8]]
ANGLES = {"A": [0, 20, 40, 80], "B": [0, 0, 0, 0], "C": [0, 0, 45, 45], "D": [0, 50, 100, 150]}
PREDICTED_C = [[1, 5], [2, 3], [2, 4], [5, 6]]
PREDICTED_D = D
PREDICTED_ANGLES = {"C": [10, 50, 45, 0], "D": [0, 50, 100, 150]}


def paper_trace() -> AttentionTrace:
    """Layer 0 has heads A and B, layer 1 has C and D."""
    steps = range(4)
    return make_trace(
        [[[A[s], B[s]], [C[s], D[s]]] for s in steps],
        angles=[[[ANGLES["A"][s], ANGLES["B"][s]], [ANGLES["C"][s], ANGLES["D"][s]]] for s in steps],
        predicted_pages=[[[A[s], B[s]], [PREDICTED_C[s], PREDICTED_D[s]]] for s in steps],
        predicted_angles=[[[0, 0], [PREDICTED_ANGLES["C"][s], PREDICTED_ANGLES["D"][s]]] for s in steps],
    )


def history(trace: AttentionTrace, budget: int = 2, **changes: Any) -> HeadHistory:
    plan = tiny_scene(trace).plan(tiny_design(budget, **changes))
    return replay(trace, policy_of(plan, trace))


def columns(values: Any) -> list[list[int]]:
    """One list of steps per head."""
    return np.asarray(values).T.astype(int).tolist()


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

    def test_belady_keeps_what_is_needed_next(self) -> None:
        # two slots. A starts with {1,2}: nothing; 3 for 1; 1 for 2; 2 for 3. B starts with {9,10}: 4 for 9; 9 for 10.
        # C starts with {1,2}: 3 for 1; there; 5,6. D starts with {7,8}.
        trace = paper_trace()
        plan = tiny_scene(trace).plan(tiny_design(2, cache="lru"))
        assert columns(fewest_pages(trace, policy_of(plan, trace))) == [
            [0, 1, 1, 1],
            [0, 1, 1, 0],
            [0, 1, 0, 2],
            [0, 0, 0, 0],
        ]


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


def brute_force(wanted: list[frozenset[int]], slots: int, pages: range) -> int:
    """Fewest fetches over every initial content and every eviction."""
    states = {frozenset(content): 0 for content in itertools.combinations(pages, min(slots, len(pages)))}
    for need in wanted:
        following: dict[frozenset[int], int] = {}
        for content, cost in states.items():
            everything = content | need
            price = cost + len(need - content)
            for kept in itertools.combinations(
                sorted(everything - need), min(slots - len(need), len(everything - need))
            ):
                state = need | frozenset(kept)
                following[state] = min(price, following.get(state, 10**9))
        states = following
    return min(states.values())


@given(st.lists(st.permutations(range(1, 7)), min_size=2, max_size=5), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_belady_against_brute_force(orders: list[list[int]], slots: int) -> None:
    chosen = [order[:2] for order in orders]
    trace = make_trace([[[pages], [pages]] for pages in chosen], context_tokens=32)
    plan = tiny_scene(trace).plan(tiny_design(2, cache="lru", slot_pages=slots))
    policy = policy_of(plan, trace)
    found = fewest_pages(trace, policy).sum(axis=0)
    expected = brute_force([frozenset(pages) for pages in chosen], policy.slot_pages, range(1, 7))
    assert found.tolist() == [expected] * 2


@pytest.mark.parametrize("seed", range(4))
def test_no_exact_policy_beats_belady_and_more_slots_never_fetch_more(seed: int) -> None:
    trace = random_trace(seed, steps=20)
    moved = []
    for slots in (4, 5, 7, 10, 14):
        plan = tiny_scene(trace).plan(tiny_design(4, cache="lru", slot_pages=slots))
        policy = policy_of(plan, trace)
        lru = replay(trace, policy).demand_pages.sum()
        assert fewest_pages(trace, policy).sum() <= lru
        moved.append(int(lru))
    # LRU has the inclusion property (Mattson et al., 1970)
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] == 0


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


class TestThresholds:
    def test_anchored_hit_rate_by_hand(self) -> None:
        trace = paper_trace()
        queries = stepwise(trace.queries, 2)
        rate = anchored_hit_rate(queries, Fold(trace, tiny_design(2).gqa_fold), np.full(4, TAU, dtype=np.float32))
        # A: hit, miss, miss; B: three hits; C: hit, miss, hit; D: three misses
        assert rate.tolist() == pytest.approx([1 / 3, 1, 2 / 3, 0])

    @pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
    def test_tau_reaches_the_target_and_the_next_larger_does_not(self, target: float) -> None:
        trace = random_trace(1, steps=40)
        queries, fold = stepwise(trace.queries, 2), Fold(trace, tiny_design(2).gqa_fold)
        tau = tau_for_hit_rate(queries, fold, target)
        assert np.all(anchored_hit_rate(queries, fold, tau) >= target)
        larger = np.asarray(tau + 1 / 4096, dtype=np.float32)
        assert np.all((anchored_hit_rate(queries, fold, larger) < target) | (larger >= 1))

    @pytest.mark.parametrize("target", [0.3, 0.6])
    def test_a_design_reuses_as_often_as_it_aims_to(self, target: float) -> None:
        missed = history(random_trace(1, steps=41), 4, cache="head_reuse", target_hit_rate=target).demand_missed
        assert np.all(1 - missed[1:].mean(axis=0) >= target)


class TestThresholdsByImportance:
    @given(
        st.floats(-1, 1),
        st.floats(0, 2),
        arrays(np.float64, (2, 6), elements=st.floats(0, 8)),
    )
    def test_more_important_heads_never_have_lower_thresholds(
        self, tau: float, power: float, importance: NDArray[np.float64]
    ) -> None:
        found = tau_by_importance(tau, power, importance, 3)
        order = np.argsort(importance.reshape(2, 3, 2).mean(-1), axis=1, kind="stable")
        assert np.all(np.diff(np.take_along_axis(found, order, 1), axis=1) >= -1e-12)
        assert np.all((found >= -1) & (found <= 1))

    def test_by_hand(self) -> None:
        """Four times as important: half the drift. Of mean importance: tau. Nothing at all: any drift."""
        found = tau_by_importance(0.8, 0.5, [[4.0, 4.0, 1.0, 1.0, 0.0, 0.0]], 3)
        np.testing.assert_allclose(found, [[0.9, 0.8, -1.0]])

    @given(st.floats(-1, 2), arrays(np.float64, (2, 4), elements=st.floats(0, 8)))
    def test_without_power_all_are_equal(self, tau: float, importance: NDArray[np.float64]) -> None:
        np.testing.assert_allclose(tau_by_importance(tau, 0.0, importance, 2), np.full((2, 2), tau), atol=1e-12)

    def test_heads_drift_as_far_as_their_importance_lets_them(self) -> None:
        """The replay against a gate written out here."""
        trace = random_trace(1, steps=41)
        found = history(trace, 4, cache="head_reuse", gqa_fold="mean", tau=0.3, tau_importance_power=1.0).demand_missed
        of_group = np.asarray(trace.head_importance, dtype=np.float64).reshape(len(found[0]), -1).mean(-1)
        tau = np.clip(1 - 0.7 / of_group, -1, 2)
        queries = np.asarray(trace.queries, dtype=np.float64)
        queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
        queries = queries.reshape(len(queries), len(tau), -1, queries.shape[-1])
        anchor = np.zeros_like(queries[0])
        for step, query in enumerate(queries):
            missed = (query * anchor).sum(-1).mean(-1) < tau if step else np.ones(len(tau), dtype=bool)
            np.testing.assert_array_equal(found[step], missed)
            anchor[missed] = query[missed]


class TestTraffic:
    """From heads to layers: sums are the direct sums, whatever the detour."""

    def test_own_model_at_batch_one_is_the_direct_sum(self) -> None:
        trace = random_trace(2)
        scene = tiny_scene(trace)
        plan = scene.plan(tiny_design(4, cache="lru", slot_pages=6))
        traffic = scene.source.traffic(plan)
        direct = history(trace, 4, cache="lru", slot_pages=6).demand_pages.reshape(6, 3, 2).sum(axis=2)
        np.testing.assert_array_equal(traffic.demand_pages, direct)
        assert traffic.hit_rate == pytest.approx(1 - direct.sum() / (6 * 3 * 2 * 4))

    def test_a_context_twice_as_long_moves_twice_the_pages(self) -> None:
        # equal shares of the context are kept and attended: 8 of 32 pages where 4 of 16 were recorded
        trace = random_trace(2)
        small = tiny_scene(trace)
        workload = small.workload.with_fields(context_tokens=128)
        design = tiny_design(8, cache="lru", slot_pages=12, prefetch_depth=1)
        long = small.source.traffic(make_plan(small.model, small.machine, design, workload))
        recorded = history(trace, 4, cache="lru", slot_pages=6, prefetch_depth=1)
        np.testing.assert_array_equal(long.demand_pages.sum(axis=1), 2 * recorded.demand_pages.sum(axis=1))
        np.testing.assert_array_equal(long.spec_pages.sum(axis=1), 2 * recorded.spec_pages.sum(axis=1))
        # heads are heads, however long their context
        np.testing.assert_array_equal(long.demand_heads.sum(axis=1), recorded.demand_missed.sum(axis=1))

    def test_batch_scales_the_mean(self) -> None:
        trace = random_trace(3, steps=16)
        scene = tiny_scene(trace, batch=8)
        design = tiny_design(4, cache="lru")
        one = tiny_scene(trace).source.traffic(tiny_scene(trace).plan(design)).demand_pages
        eight = scene.source.traffic(scene.plan(design)).demand_pages
        # rotating the steps of a sequence keeps its total
        assert eight.sum() == pytest.approx(8 * one.sum())

    def test_resampled_heads_move_what_the_recorded_ones_do_in_expectation(self) -> None:
        # five layers of four heads over three recorded layers: model layer 0, at depth 0, draws from recorded layers 0
        # and 1, layer 2 from all, layer 4 from 1 and 2; each of these heads is as likely
        trace = random_trace(6, steps=16)
        small = tiny_scene(trace)
        moved = history(trace, 4, cache="lru").demand_pages.mean(axis=0).reshape(3, 2)
        batch = 400
        model = small.model.with_fields(num_layers=5, num_query_heads=4, num_kv_heads=4)
        workload = small.workload.with_fields(batch=batch)
        plan = make_plan(model, small.machine, tiny_design(4, cache="lru"), workload)
        found = small.source.traffic(plan).demand_pages.mean(axis=0) / (4 * batch)
        for layer, sources in ((0, [0, 1]), (2, [0, 1, 2]), (4, [1, 2])):
            candidates = moved[sources]
            # five standard errors of the mean of 1600 draws
            error = 5 * candidates.std() / math.sqrt(4 * batch)
            assert found[layer] == pytest.approx(candidates.mean(), abs=error + 1e-9), layer

    @pytest.mark.parametrize("depth", [1, 2])
    @pytest.mark.parametrize("cache", ["none", "lru", "head_reuse"])
    def test_nothing_is_predicted_for_the_first_layers(self, cache: str, depth: int) -> None:
        traffic = self.resampled(cache, depth, dense_layers=depth)
        assert np.all(traffic.spec_pages[:, depth:].sum(axis=0) > 0)
        assert not traffic.fetched_pages[:, :depth].any()

    @pytest.mark.parametrize(("cache", "depth"), [("none", 1), ("none", 2), ("lru", 1), ("head_reuse", 1)])
    def test_nothing_is_predicted_for_the_first_layers_without_dense_ones(self, cache: str, depth: int) -> None:
        traffic = self.resampled(cache, depth, dense_layers=0)
        assert not traffic.spec_pages[:, :depth].any()
        if cache == "none":
            assert not traffic.demand_pages[:, depth:].any()

    def resampled(self, cache: str, depth: int, dense_layers: int) -> Traffic:
        trace = random_trace(7)
        small = tiny_scene(trace, batch=4)
        changes: dict[str, Any] = {"slot_pages": None} if cache == "none" else {}
        design = tiny_design(4, cache=cache, prefetch_depth=depth, dense_layers=dense_layers, **changes)
        return small.source.traffic(
            make_plan(small.model.with_fields(num_layers=6), small.machine, design, small.workload)
        )

    def test_pinned_heads_move_nothing(self) -> None:
        trace = random_trace(4)
        scene = tiny_scene(trace)
        half = scene.source.traffic(scene.plan(tiny_design(4, cache="lru", pinned_head_fraction=0.5)))
        moved = history(trace, 4, cache="lru").demand_pages.reshape(6, 3, 2)
        # of each layer's two heads the one that moves less stays on the host
        assert half.demand_pages.sum() == moved.sum(axis=0).min(axis=1).sum()
        none = scene.source.traffic(scene.plan(tiny_design(4, cache="lru", pinned_head_fraction=1.0)))
        assert none.demand_pages.sum() == 0

    def test_same_seed_same_traffic_and_another_seed_another(self) -> None:
        trace = random_trace(5, steps=16)
        scene = tiny_scene(trace, batch=4)
        model = scene.model.with_fields(num_layers=5)
        design = tiny_design(4, cache="lru")

        def pages(seed: int) -> Any:
            workload = scene.workload.with_fields(seed=seed)
            return TrafficSource(trace).traffic(make_plan(model, scene.machine, design, workload)).demand_pages

        np.testing.assert_array_equal(pages(1), pages(1))
        assert not np.array_equal(pages(1), pages(2))


class TestFewestPages:
    """The roofline's host link: no exact design moves less."""

    @given(st.integers(0, 50), st.integers(4, 9))
    @settings(max_examples=40, deadline=None)
    def test_an_exact_cache_moves_at_least_as_much(self, seed: int, slots: int) -> None:
        scene = tiny_scene(random_trace(seed))
        plan = scene.plan(tiny_design(4, cache="lru", slot_pages=slots))
        moved = scene.source.traffic(plan).demand_pages.sum() / 6
        assert scene.source.fewest_fetched_pages(plan) <= moved * (1 + 1e-12)

    @pytest.mark.parametrize("fraction", [0.5, 1.0])
    def test_pinned_heads_need_nothing(self, fraction: float) -> None:
        scene = tiny_scene(random_trace(0))
        plan = scene.plan(tiny_design(4, cache="lru", pinned_head_fraction=fraction))
        moved = scene.source.traffic(plan).demand_pages.sum() / 6
        assert scene.source.fewest_fetched_pages(plan) <= moved

    def test_it_bounds_the_measured_steps(self) -> None:
        # nothing but the first two steps is measured, and both find the pages that prefill left
        pages = [[[[9, 10]], [[9, 10]]]] * 2 + [[[[1, 2]], [[1, 2]]], [[[3, 4]], [[3, 4]]]]
        scene = tiny_scene(make_trace(pages), steps=2)
        plan = scene.plan(tiny_design(2, cache="lru"))
        assert scene.source.traffic(plan).demand_pages.sum() == 0
        assert scene.source.fewest_fetched_pages(plan) == 0
