"""Prefill on GPUs of its own: who does what when, by rules written down anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service import growing_clock, toy_costs, trace_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo_sim.serving import ServiceSettings, generate, serve, summarise_service, worker_costs

NETWORK = 1e8
"""Ten nanoseconds a token."""


def apart(**fields: Any) -> ServiceSettings:
    return ServiceSettings(**({"gpus": 2, "prefill_gpus": 1, "network_bytes_per_s": NETWORK} | fields))


def by_the_rules(rows: Sequence[tuple[int, int, int]], token_ns: int) -> tuple[list[int], list[int]]:
    """One GPU prefills a prompt after the other, whole; another has room for every sequence that it decodes."""
    free, first = 0, []
    for arrival, inputs, _ in rows:
        free = max(free, arrival) + token_ns * inputs
        first.append(free)
    finish = list(first)
    ready = sorted((first[n] + 10 * inputs, n) for n, (_, inputs, outputs) in enumerate(rows) if outputs > 1)
    now, running = 0, dict[int, int]()
    while ready or running:
        if not running:
            now = max(now, ready[0][0])
        running |= {number: 1 for moment, number in ready if moment <= now}
        ready = [each for each in ready if each[0] > now]
        contexts = [rows[number][1] + out for number, out in running.items()]
        now += growing_clock(len(running)).total(sum(contexts) // len(contexts), 1)
        running = {number: out + 1 for number, out in running.items()}
        for number in [number for number, out in running.items() if out == rows[number][2]]:
            finish[number] = now
            del running[number]
    return first, finish


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=25),
    st.sampled_from([1, 70, 1000]),
)
@settings(max_examples=150, deadline=None)
def test_two_workers_do_what_the_rules_say(drawn: list[tuple[int, int, int]], token_ns: int) -> None:
    arrivals = accumulate(gap for gap, _, _ in drawn)
    rows = [(now, inputs, outputs) for now, (_, inputs, outputs) in zip(arrivals, drawn, strict=True)]
    # chunks as long as a prompt: several short prompts would share one, and end together
    costs = toy_costs(clock=growing_clock, token_ns=token_ns, chunk_tokens=1)
    run = serve(trace_of(rows), costs, apart())
    assert (run.stamps.first_ns, run.stamps.finish_ns) == by_the_rules(rows, token_ns)


def test_a_gap_before_the_second_token_holds_the_way_and_the_wait() -> None:
    # prefill 10 us, 100 ns on the way; the first sequence finds the worker idle, the second a step of 1 ms under way
    rows = [(0, 10, 3), (200_000, 10, 2)]
    run = serve(trace_of(rows), toy_costs(token_ns=1000, chunk_tokens=10), apart())
    assert run.stamps.first_ns == [10_000, 210_000]
    assert run.stamps.finish_ns == [2_010_100, 2_010_100]
    (prefill, decode) = (replica.tally for replica in run.replicas)
    assert not prefill.gaps
    gaps = {gap: count for gap, count in decode.gaps.items() if count}
    assert gaps == {1_000_100: 1, 1_000_000: 1, 2_010_100 - 210_000: 1}


def test_what_is_preempted_is_prefilled_again_where_it_decodes() -> None:
    rows = [(0, 20, 60), (1, 20, 60)]
    costs = toy_costs(token_ns=1000, chunk_tokens=20, device_tokens=100)
    run = serve(trace_of(rows), costs, apart())
    prefill, decode = (replica.tally for replica in run.replicas)
    assert prefill.prefill_ns == 40_000
    assert decode.preemptions == 1
    again = decode.prefill_ns
    assert 20_000 < again < 80_000
    result = summarise_service(run)
    assert result.completed == 2


def test_requests_are_rejected_before_anything_is_computed() -> None:
    rows = [(0, 0, 5), (1, 5, 0), (2, 90, 20), (3, 5, 5)]
    run = serve(trace_of(rows), toy_costs(token_ns=1, device_tokens=100), apart())
    assert run.rejected == {"empty_prompt": 1, "empty_output": 1, "gpu_memory": 1}
    assert run.replicas[0].tally.prompt_tokens == 5


def test_prefixes_are_kept_where_prompts_are_read() -> None:
    rows = [(0, 12, 2, (1, 2, 3)), (10_000_000, 12, 2, (1, 2, 3))]
    run = serve(trace_of(rows), toy_costs(token_ns=1000, chunk_tokens=64, block_tokens=4), apart())
    assert summarise_service(run).prefix_hit_rate == pytest.approx(11 / 24)
    assert run.stamps.first_ns[1] - 10_000_000 == 1000


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prefill_gpus": 2}, "prefill_gpus = 2: must leave some of gpus = 2 to decode on"),
        ({"prefill_gpus": -1}, "prefill_gpus = -1"),
        ({"network_bytes_per_s": 0.0}, "network_bytes_per_s = 0: must be positive"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        apart(**fields)


def test_long_prompts_no_longer_stretch_the_gaps_of_others() -> None:
    """Four H200, prompts of 32K tokens: with three that prefill alone TPOT is that of decoding, TTFT as it was."""
    load = generate("poisson", rate_per_s=2.0, num_requests=300, lengths=[(32768, 200)], seed=1)
    costs = worker_costs(clo_sim.make_scene("llama-3-8b", "h200"), presets.load_design("clo"), load)
    together = ServiceSettings(gpus=4)
    mixed, split = (summarise_service(serve(load, costs, one)) for one in (together, replace(together, prefill_gpus=3)))
    assert mixed.tpot_s.p95 is not None
    assert split.tpot_s.p95 is not None
    assert split.tpot_s.p95 < 0.5 * mixed.tpot_s.p95
    alone_s = costs.clock(1).total(32768, 1) / 1e9
    assert split.itl_s.p50 == pytest.approx(alone_s, rel=0.5)
    # the first gap of each holds the KV's way over the network
    kv_bytes = 32768 * costs.handed_token_bytes
    assert split.itl_s.max is not None
    assert split.itl_s.max > kv_bytes / together.network_bytes_per_s
