"""The service against queueing theory, bookkeeping that must close, and coalescing that must be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service import PLENTY, toy_costs, trace_of

import clo_sim
from clo import presets
from clo.errors import RequestError, SpecError
from clo.plan import make_plan
from clo_sim.serving import (
    RequestTrace,
    ServiceRun,
    ServiceSettings,
    WorkerCosts,
    generate,
    serve,
    summarise_service,
    worker_costs,
)
from clo_sim.serving.clocks import StepClock
from clo_sim.serving.memory import memory_need, roomy, smallest_plan
from clo_sim.serving.prefill import pairs_of
from clo_sim.serving.prefix import PrefixCache
from clo_sim.serving.stability import judge, mean_in_system

STEPS = 1000
"""Decode steps of a mean service time: a millisecond each, so that service takes a second."""
T99 = 2.861
"""Student's t, 19 degrees of freedom, two-sided 99%."""


def times_in_system(run: ServiceRun) -> np.ndarray[Any, Any]:
    arrival = np.array([request.arrival_ns for request in run.trace.requests])
    return (np.array(run.stamps.finish_ns) - arrival) / 1e9


def queue(load: float, *, servers: int = 1, gpus: int = 1, exponential: bool = True, seed: int = 1) -> ServiceRun:
    """Poisson arrivals; a request decodes for a second on average, `servers` at a time on each of `gpus` workers."""
    rng = np.random.default_rng(seed)
    draws = rng.exponential(STEPS, 60_000) if exponential else np.full(1, STEPS)
    lengths = [(1, 1 + max(1, round(draw))) for draw in draws.tolist()]
    trace = generate("poisson", rate_per_s=load, num_requests=42_000, lengths=lengths, seed=seed)
    return serve(trace, toy_costs(), ServiceSettings(max_batch=servers, gpus=gpus, routing="round_robin"))


def erlang_c(servers: int, offered: float) -> float:
    """Chance to wait (Erlang's second formula)."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


def erlang2_sigma(rate: float) -> float:
    """Root in (0, 1) of sigma = A*(1 - sigma) for Erlang-2 gaps with stages of this rate, service rate 1 (GI/M/1)."""
    sigma = 0.5
    for _ in range(500):
        sigma = (rate / (rate + 1 - sigma)) ** 2
    return sigma


class TestQueueingTheory:
    @pytest.mark.parametrize(
        ("name", "run", "mean_s"),
        [
            ("M/M/1", lambda: queue(0.6), 1 / (1 - 0.6)),
            ("M/D/1", lambda: queue(0.7, exponential=False), 1 + 0.7 / (2 * (1 - 0.7))),
            ("M/M/3", lambda: queue(2.1, servers=3), 1 + erlang_c(3, 2.1) / (3 - 2.1)),
            # Poisson arrivals dealt out in turn to two workers: each sees Erlang-2 gaps
            ("E2/M/1", lambda: queue(1.2, gpus=2), 1 / (1 - erlang2_sigma(1.2))),
        ],
    )
    def test_mean_time_in_system(self, name: str, run: Any, mean_s: float) -> None:
        batches = times_in_system(run())[2000:].reshape(20, -1).mean(axis=1)
        half_width = T99 * batches.std(ddof=1) / math.sqrt(20)
        assert abs(batches.mean() - mean_s) < half_width, (name, batches.mean(), mean_s, half_width)
        assert half_width < 0.12 * mean_s, "too wide to tell anything"

    def test_a_share_of_the_time_is_busy(self) -> None:
        result = summarise_service(queue(0.6))
        assert result.busy_share == pytest.approx(0.6, rel=0.02)
        assert result.unstable is False

    @pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
    def test_what_keeps_up_is_stable(self, load: float) -> None:
        assert summarise_service(queue(load, seed=5)).unstable is False

    def test_what_does_not_keep_up_has_no_latency(self) -> None:
        result = summarise_service(queue(1.25))
        assert result.unstable is True
        assert result.ttft_s.p95 is None
        assert result.e2e_s.mean is None
        assert result.tpot_s.p95 is not None
        # of 1.25 requests a second 0.25 stay behind: a fifth
        assert result.excess_share == pytest.approx(0.2, rel=0.15)

    def test_few_requests_tell_nothing(self) -> None:
        trace = trace_of([(number, 1, 2) for number in range(50)])
        assert summarise_service(serve(trace, toy_costs(), ServiceSettings())).unstable is None


def test_of_a_steady_load_the_excess_stays_behind() -> None:
    # one comes every 800 ns, one leaves every 1000: of 1.25 requests 0.25 stay
    arrival = np.arange(10_000) * 800
    found = judge(arrival, (np.arange(10_000) + 1) * 1000)
    assert found.unstable is True
    assert found.excess_share == pytest.approx(0.2, rel=1e-3)


def test_backlog_is_averaged_over_time() -> None:
    arrival, finish = np.array([0, 10, 20]), np.array([30, 15, 40])
    edges = np.array([0.0, 10.0, 20.0, 40.0])
    assert mean_in_system(arrival, finish, edges).tolist() == [1.0, 1.5, 1.5]


def test_a_burst_that_drains_is_no_trend() -> None:
    arrival = np.sort(np.concatenate([np.arange(1000) * 1000, np.full(300, 300_000)]))
    finish = np.maximum.accumulate(arrival + 100) + np.where(arrival == 300_000, 50_000, 0)
    assert judge(arrival, finish).unstable is False


steps = st.lists(st.integers(1, 10_000), min_size=1, max_size=20)


class TestStepClock:
    @given(steps, st.integers(0, 5), st.integers(0, 700), st.integers(1, 300))
    def test_many_steps_take_what_they_take_one_by_one(
        self, values: list[int], shift: int, context: int, count: int
    ) -> None:
        clock = StepClock.of(values, shift=shift)
        alone = [values[min((context + one) >> shift, len(values) - 1)] for one in range(count)]
        assert clock.total(context, count) == sum(alone)
        spread = [step for step, times in clock.pieces(context, count) for _ in range(times)]
        assert spread == alone

    @given(steps, st.integers(0, 5), st.integers(0, 700), st.integers(1, 10**6))
    def test_the_fewest_steps_that_pass_a_time(
        self, values: list[int], shift: int, context: int, nanoseconds: int
    ) -> None:
        clock = StepClock.of(values, shift=shift)
        count = clock.steps_to_pass(context, nanoseconds)
        assert clock.total(context, count) >= nanoseconds
        assert count == 1 or clock.total(context, count - 1) < nanoseconds


def growing_clock(batch: int) -> StepClock:
    """Longer steps for larger batches and contexts, with no common divisor."""
    return StepClock.of([997 + 101 * batch + 13 * bucket * batch for bucket in range(12)], shift=2)


@st.composite
def services(draw: st.DrawFn) -> tuple[RequestTrace, WorkerCosts, ServiceSettings]:
    """Short traces with shared prefixes on small memories: queues, preemptions, rejections, evictions."""
    rows, now = [], 0
    for _ in range(draw(st.integers(1, 25))):
        now += draw(st.integers(0, 20_000))
        inputs, outputs = draw(st.integers(0, 40)), draw(st.integers(0, 30))
        family = draw(st.integers(0, 2))
        blocks = tuple(100 * family + block for block in range(inputs // 4))
        rows.append((now, inputs, outputs, blocks))
    costs = toy_costs(
        clock=growing_clock,
        token_ns=draw(st.sampled_from([0, 70, 1000])),
        chunk_tokens=draw(st.integers(1, 50)),
        device_tokens=draw(st.sampled_from([60, 100, 150, PLENTY])),
        host_tokens=draw(st.sampled_from([60, 120, PLENTY])),
        block_tokens=draw(st.sampled_from([0, 4])),
        max_tokens=draw(st.sampled_from([65, PLENTY])),
    )
    service = ServiceSettings(
        gpus=draw(st.integers(1, 3)),
        routing=draw(st.sampled_from(["least_loaded", "round_robin", "prefix"])),
        pressure=draw(st.sampled_from(["preempt", "queue"])),
        max_batch=draw(st.sampled_from([1, 3, 256])),
    )
    return trace_of(rows), costs, service


def everything(run: ServiceRun) -> Any:
    tallies = [{name: getattr(replica.tally, name) for name in replica.tally.__slots__} for replica in run.replicas]
    return run.stamps.first_ns, run.stamps.finish_ns, dict(run.rejected), tallies


def served_by_the_rules(
    rows: Sequence[tuple[int, int, int]], *, token_ns: int, chunk_tokens: int, max_batch: int
) -> tuple[list[int], list[int]]:
    """First and last tokens of one worker that has memory for all, iteration by iteration, as the docs have it."""
    first, finish, waiting = [-1] * len(rows), [-1] * len(rows), list(range(len(rows)))
    to_prefill = [inputs for _, inputs, _ in rows]
    running: dict[int, int] = {}  # answer tokens that have come out
    now = 0
    while waiting or running:
        if not running:
            now = max(now, rows[waiting[0]][0])
        room, ended = chunk_tokens, []
        for number in [number for number in waiting if rows[number][0] <= now][: max_batch - len(running)]:
            taken = min(room, to_prefill[number])
            room, to_prefill[number] = room - taken, to_prefill[number] - taken
            ended += [] if to_prefill[number] else [number]
        step_ns = token_ns * (chunk_tokens - room)
        if running:
            contexts = [rows[number][1] + out for number, out in running.items()]
            step_ns += growing_clock(len(running)).total(sum(contexts) // len(contexts), 1)
        now += step_ns
        running = {number: out + 1 for number, out in running.items()} | dict.fromkeys(ended, 1)
        for number in [number for number, out in running.items() if out == rows[number][2]]:
            finish[number] = now
            del running[number]
        for number in ended:
            first[number] = now
            waiting.remove(number)
    return first, finish


@given(
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=25),
    st.sampled_from([0, 70, 1000]),
    st.integers(1, 50),
    st.sampled_from([1, 3, 256]),
)
@settings(max_examples=150, deadline=None)
def test_a_worker_does_what_the_rules_say(
    drawn: list[tuple[int, int, int]], token_ns: int, chunk_tokens: int, max_batch: int
) -> None:
    arrivals = accumulate(gap for gap, _, _ in drawn)
    rows = [(now, inputs, outputs) for now, (_, inputs, outputs) in zip(arrivals, drawn, strict=True)]
    costs = toy_costs(clock=growing_clock, token_ns=token_ns, chunk_tokens=chunk_tokens)
    run = serve(trace_of(rows), costs, ServiceSettings(max_batch=max_batch))
    expected = served_by_the_rules(rows, token_ns=token_ns, chunk_tokens=chunk_tokens, max_batch=max_batch)
    assert (run.stamps.first_ns, run.stamps.finish_ns) == expected


class TestEveryRun:
    @settings(max_examples=150, deadline=None)
    @given(services())
    def test_coalescing_is_exact(self, case: tuple[RequestTrace, WorkerCosts, ServiceSettings]) -> None:
        trace, costs, service = case
        together = serve(trace, costs, service)
        one_by_one = serve(trace, costs, replace(service, coalesce=False))
        assert everything(together) == everything(one_by_one)

    @settings(max_examples=150, deadline=None)
    @given(services())
    def test_nothing_is_lost_and_the_books_close(self, case: tuple[RequestTrace, WorkerCosts, ServiceSettings]) -> None:
        trace, costs, service = case
        run = serve(trace, costs, service)
        done = [number for number, stamp in enumerate(run.stamps.finish_ns) if stamp >= 0]
        assert len(done) + run.rejected.total() == len(trace)
        served = [trace.requests[number] for number in done]
        first, finish = ([stamps[number] for number in done] for stamps in (run.stamps.first_ns, run.stamps.finish_ns))
        assert all(a.arrival_ns <= b <= c for a, b, c in zip(served, first, finish, strict=True))
        tallies = [replica.tally for replica in run.replicas]
        # tokens out = tokens asked: a first token each, and a gap before every other one
        tokens = sum(sum(tally.gaps.values()) for tally in tallies) + len(done)
        assert tokens == sum(request.output_tokens for request in served)
        # Little's law: requests times time, summed while running, is time in system, summed over requests
        sojourn = sum(stamp - request.arrival_ns for stamp, request in zip(finish, served, strict=True))
        assert sum(tally.area_ns for tally in tallies) == sojourn
        gaps = sum(gap * count for tally in tallies for gap, count in tally.gaps.items())
        assert gaps == sum(b - a for a, b in zip(first, finish, strict=True))
        assert all(tally.peak_device_bytes <= costs.room.device for tally in tallies)
        assert all(tally.peak_host_bytes <= costs.room.host for tally in tallies)
        held = (sample.host_bytes + sample.prefix_bytes for tally in tallies for sample in tally.samples)
        assert max(held, default=0) <= costs.room.host
        assert all(replica.unfinished == 0 and replica.waiting_tokens == 0 for replica in run.replicas)

    @settings(max_examples=150, deadline=None)
    @given(services())
    def test_samples_count_who_is_there(self, case: tuple[RequestTrace, WorkerCosts, ServiceSettings]) -> None:
        trace, costs, service = case
        run = serve(trace, costs, replace(service, gpus=1))
        (replica,) = run.replicas
        stays = [(one.arrival_ns, end) for one, end in zip(trace.requests, run.stamps.finish_ns, strict=True)]
        for sample in replica.tally.samples:
            there = sum(arrival <= sample.now_ns <= finish for arrival, finish in stays)
            assert sample.waiting + sample.running == there
        assert len(replica.tally.samples) < 800

    def test_samples_are_evenly_spaced_however_long_a_run_is(self) -> None:
        """A hundred requests in a microsecond, then minutes of decoding."""
        trace = trace_of([(10 * number, 1, 1 + 1000 * (number % 7)) for number in range(100)])
        run = serve(trace, toy_costs(), ServiceSettings(max_batch=2))
        samples = run.replicas[0].tally.samples
        assert 300 < len(samples) < 800
        times = np.array([sample.now_ns for sample in samples])
        assert set(np.diff(times[1:]).tolist()) == {times[-1] - times[-2]}
        # Little's law: the mean number there is the time in system of all, over that of the run
        mean = np.mean([sample.waiting + sample.running for sample in samples])
        assert mean == pytest.approx(times_in_system(run).sum() / (max(run.stamps.finish_ns) / 1e9), rel=0.02)


class TestMemory:
    def test_host_memory_holds_as_many_as_fit(self) -> None:
        trace = trace_of([(0, 10, 20) for _ in range(12)])
        run = serve(trace, toy_costs(host_tokens=100), ServiceSettings(pressure="queue"))
        # 30 tokens each at the end: three fit into 100
        assert run.replicas[0].tally.peak_running == 3
        assert run.replicas[0].tally.preemptions == 0
        # the prompts cost nothing: four rounds of three, 19 steps each
        assert max(run.stamps.finish_ns) == 4 * 19 * 1_000_000

    def test_under_pressure_the_newest_makes_room(self) -> None:
        trace = trace_of([(0, 10, 60), (0, 10, 60)])
        costs = toy_costs(device_tokens=100)
        preempting = serve(trace, costs, ServiceSettings(pressure="preempt"))
        queueing = serve(trace, costs, ServiceSettings(pressure="queue"))
        assert preempting.replicas[0].tally.preemptions == 1
        # both grow to 50 tokens in 39 steps after the 11 they start with; then the first goes on alone
        assert preempting.stamps.finish_ns[0] == 59 * 1_000_000
        assert preempting.stamps.finish_ns[1] == (59 + 59 - 39 - 1) * 1_000_000
        assert queueing.stamps.finish_ns == [59 * 1_000_000, 118 * 1_000_000]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ((0, 0, 5), "empty_prompt"),
            ((0, 5, 0), "empty_output"),
            ((0, 900, 101), "longer_than_model"),
            ((0, 300, 1), "gpu_memory"),
            ((0, 150, 60), "host_memory"),
        ],
    )
    def test_what_can_never_be_served_is_counted(self, row: tuple[int, int, int], reason: str) -> None:
        costs = toy_costs(device_tokens=300, host_tokens=200, max_tokens=1000)
        run = serve(trace_of([(0, 5, 5), row, (1, 5, 5)]), costs, ServiceSettings())
        assert dict(run.rejected) == {reason: 1}
        assert [stamp >= 0 for stamp in run.stamps.finish_ns] == [True, False, True]

    @pytest.mark.parametrize("name", ["resident", "clo", "resolve", "staged", "streamed", "clo-v2"])
    def test_a_sequence_needs_what_the_plan_counts(self, name: str) -> None:
        scene, design = clo_sim.make_scene(), presets.load_design(name)
        need = memory_need(scene, design)
        for tokens in (1, 63, 1000, 4097, 33_333, 131_072, 700_001):
            plan = smallest_plan(scene, design, batch=1, context_tokens=tokens)
            slack = 3 * plan.memory.slots / plan.slot_pages + 0.001 * plan.memory.kv + need.device(0)
            assert plan.memory.kv <= need.device(tokens) <= plan.memory.kv + slack
            assert plan.host_bytes <= need.host(tokens) <= 1.001 * plan.host_bytes + 1

    def test_admitted_sequences_fit_the_machine(self) -> None:
        scene, design = clo_sim.make_scene(), presets.load_design("clo")
        need, batch, tokens = memory_need(scene, design), 24, 100_000
        machine = roomy(scene).machine
        workload = scene.workload.with_fields(batch=batch, context_tokens=tokens)
        plan = make_plan(scene.model, machine, design.with_fields(slot_budgets=1.0), workload)
        assert plan.memory.kv <= batch * need.device(tokens)


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


class TestPrices:
    def test_chunks_of_a_prompt_add_up(self) -> None:
        assert sum(pairs_of(start, 16) for start in range(0, 160, 16)) == pairs_of(0, 160)
        prices = toy_costs(token_ns=7, chunk_tokens=10).prefill
        assert prices.alone_ns(35) == 35 * 7
        assert prices.alone_ns(35, 30) == 5 * 7

    def test_more_device_memory_makes_steps_faster(self) -> None:
        trace = trace_of([(0, 65536, 10)])
        scene = clo_sim.make_scene()
        gpu = scene.machine.gpu.model_copy(update={"memory_bytes": 60e9})
        less = replace(scene, machine=scene.machine.model_copy(update={"gpu": gpu}))
        slow, fast = (worker_costs(one, presets.load_design("resolve"), trace).clock(8) for one in (less, scene))
        assert slow.total(60_000, 1) > 1.05 * fast.total(60_000, 1)

    @pytest.mark.parametrize(("name", "batch", "context"), [("resident", 3, 3000), ("clo", 6, 24_000)])
    def test_between_priced_points_the_executor_agrees(self, name: str, batch: int, context: int) -> None:
        costs = worker_costs(clo_sim.make_scene(), presets.load_design(name), trace_of([(0, 65536, 10)]))
        assert costs.decode_prices is not None
        real = costs.decode_prices.seconds(batch, context)
        assert costs.clock(batch).total(context, 1) / 1e9 == pytest.approx(real, rel=0.03)

    def test_prefill_is_no_faster_than_arithmetic_and_links_allow(self) -> None:
        scene = clo_sim.make_scene()
        costs = worker_costs(scene, presets.load_design("clo"), trace_of([(0, 4096, 10)]))
        model, tokens = scene.model, 65_536
        flops = 2 * tokens * model.num_layers * model.layer_weight_values(0)
        flops += 4 * model.num_layers * model.num_query_heads * model.head_dim * tokens**2 / 2
        assert costs.prefill.alone_ns(tokens) / 1e9 > flops / scene.machine.gpu.peak_flops_per_s


def test_a_load_whose_last_request_never_comes_is_refused() -> None:
    with pytest.raises(RequestError, match="load rate = 1e-300 requests/s: the last of 50 would never come"):
        generate("poisson", rate_per_s=1e-300, num_requests=50, lengths=[(5, 5)])
    trace = generate("poisson", rate_per_s=4, num_requests=50, lengths=[(5, 5)])
    with pytest.raises(RequestError, match="rate multiplier = 1e-300: the last request would never come"):
        trace.at_rate(1e-300)


def test_a_service_that_never_ends_is_refused() -> None:
    with pytest.raises(SpecError, match="the last request would be done in over a century"):
        serve(trace_of([(0, 5, 5)]), toy_costs(step_ns=1 << 61), ServiceSettings())
