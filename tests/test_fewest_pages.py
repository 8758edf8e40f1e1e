"""The fewest pages that any exact cache moves (Belady): by hand, against brute force, as a bound."""

from __future__ import annotations

import itertools

import pytest
from histories import columns, paper_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_trace, random_trace, tiny_design, tiny_scene

from clo_sim.replay import fewest_pages, policy_of, replay


class TestByHand:
    """Hits, misses, diffs and evictions of every policy, head by head: A, B, C, D."""

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
