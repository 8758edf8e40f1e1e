"""The prefix cache: what it saves, and who leaves it."""

from __future__ import annotations

from toy_service import toy_costs, trace_of

from clo_sim.serving import (
    ServiceSettings,
    serve,
    summarise_service,
)
from clo_sim.serving.prefix import PrefixCache


class TestPrefixes:
    def test_the_least_recently_used_block_goes_first_from_the_end_of_a_prompt(self) -> None:
        cache = PrefixCache()
        cache.add((1, 2, 3), 5)
        cache.add((7, 8), 5)
        assert cache.use((1, 2)) == 2
        cache.add((9,), 4)
        # of 1, 2, 3 the last was used least recently; then comes the end of the second prompt
        assert (cache.held((1, 2, 3)), cache.held((7, 8)), cache.held((9,)), cache.evicted) == (2, 1, 1, 2)

    def test_a_longer_shared_prefix_saves_its_prefill(self) -> None:
        rows = [(0, 40, 1, tuple(range(10))), (10**9, 40, 1, (*range(7), 90, 91, 92))]
        run = serve(trace_of(rows), toy_costs(token_ns=1000, block_tokens=4), ServiceSettings())
        assert run.stamps.first_ns == [40_000, 10**9 + 12_000]
        assert run.replicas[0].tally.prefix_hit_tokens == 28

    def test_the_last_token_is_always_computed(self) -> None:
        rows = [(0, 40, 1, tuple(range(10))), (10**9, 40, 1, tuple(range(10)))]
        run = serve(trace_of(rows), toy_costs(token_ns=1000, block_tokens=4), ServiceSettings())
        assert run.stamps.first_ns[1] == 10**9 + 1000

    def test_more_host_memory_means_more_hits_and_less_time(self) -> None:
        families = [tuple(1000 * family + block for block in range(10)) for family in range(8)]
        rows = [(100_000 * turn, 40, 1, families[turn % 8]) for turn in range(64)]
        small, large = (
            summarise_service(
                serve(trace_of(rows), toy_costs(token_ns=1000, block_tokens=4, host_tokens=room), ServiceSettings())
            )
            for room in (100, 1000)
        )
        assert small.prefix_hit_rate < large.prefix_hit_rate
        assert (small.e2e_s.mean or 0) > 2 * (large.e2e_s.mean or 0)

    def test_the_prefix_router_finds_the_worker_that_knows_the_prompt(self) -> None:
        rows = [(10**6 * turn, 40, 1, tuple(range(100 * (turn % 2), 100 * (turn % 2) + 10))) for turn in range(9)]
        odd = [(10**6 * (9 + turn), 40, 1, tuple(range(10))) for turn in range(3)]
        run = serve(
            trace_of([*rows, *odd]), toy_costs(token_ns=100, block_tokens=4), ServiceSettings(gpus=2, routing="prefix")
        )
        assert sum(replica.tally.prefix_hit_tokens for replica in run.replicas) == 10 * 39
