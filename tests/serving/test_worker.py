"""Workers do what the rules say: books close, coalescing is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_service import PLENTY, growing_clock, times_in_system, toy_costs, trace_of

from clo.errors import RequestError, SpecError
from clo_sim.serving import (
    RequestTrace,
    ServiceRun,
    ServiceSettings,
    WorkerCosts,
    generate,
    serve,
)


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
    gpus = draw(st.integers(1, 3))
    service = ServiceSettings(
        gpus=gpus,
        prefill_gpus=draw(st.integers(0, gpus - 1)),
        network_bytes_per_s=draw(st.sampled_from([1e6, 1e12])),
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
        moving = [costs.hand_over_ns(each.input_tokens, service.network_bytes_per_s) for each in served if each[2] > 1]
        sojourn -= sum(moving) if service.prefill_gpus else 0
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
        run = serve(trace, costs, replace(service, gpus=1, prefill_gpus=0))
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


def test_a_load_whose_last_request_never_comes_is_refused() -> None:
    with pytest.raises(RequestError, match="load rate = 1e-300 requests/s: the last of 50 would never come"):
        generate("poisson", rate_per_s=1e-300, num_requests=50, lengths=[(5, 5)])
    trace = generate("poisson", rate_per_s=4, num_requests=50, lengths=[(5, 5)])
    with pytest.raises(RequestError, match="rate multiplier = 1e-300: the last request would never come"):
        trace.at_rate(1e-300)


def test_a_service_that_never_ends_is_refused() -> None:
    with pytest.raises(SpecError, match="the last request would be done in over a century"):
        serve(trace_of([(0, 5, 5)]), toy_costs(step_ns=1 << 61), ServiceSettings())
