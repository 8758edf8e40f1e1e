"""A prompt under way keeps its KV of offloaded layers on the GPU as far as memory is free; the rest is read back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_service import PLENTY, toy_costs, trace_of

import clo_sim
from clo import presets
from clo_sim.serving import ServiceSettings, WorkerCosts, serve, worker_costs


def costs_with_link(device_tokens: int = PLENTY, block_tokens: int = 0) -> WorkerCosts:
    """A nanosecond a token to compute, ten to read it back; on the GPU it takes two bytes while under way."""
    costs = toy_costs(token_ns=1, chunk_tokens=10, device_tokens=device_tokens, block_tokens=block_tokens)
    return replace(costs, prefill=replace(costs.prefill, in_ns=10.0, offloaded_bytes=2))


@pytest.mark.parametrize(("free_bytes", "expected_ns"), [(0, 10 + 100 + 200), (21, 10 + 10 + 100), (40, 30), (-5, 310)])
def test_what_does_not_stay_is_read_back_in_every_chunk(free_bytes: int, expected_ns: int) -> None:
    assert costs_with_link().prefill.alone_ns(30, free_bytes=free_bytes) == expected_ns


def test_a_prefix_comes_from_the_host_once() -> None:
    prefill = costs_with_link().prefill
    assert prefill.alone_ns(40, 20, free_bytes=PLENTY) == 200 + 10
    assert prefill.alone_ns(40, 20) == 200 + 300


@given(inputs=st.integers(1, 120), device_tokens=st.integers(130, 400))
def test_a_worker_does_as_a_prompt_alone(inputs: int, device_tokens: int) -> None:
    costs = costs_with_link(device_tokens)
    run = serve(trace_of([(0, inputs, 1)]), costs, ServiceSettings())
    assert run.stamps.first_ns == [costs.alone_ns(inputs)]
    free = device_tokens - (inputs + 1)
    assert costs.alone_ns(inputs) == costs.prefill.alone_ns(inputs, free_bytes=free)


def test_others_leave_less_room() -> None:
    rows = [(0, 5, 20), (100, 30, 1)]
    with_room, without = (serve(trace_of(rows), costs_with_link(size), ServiceSettings()) for size in (PLENTY, 60))
    assert without.replicas[0].tally.prefill_ns > with_room.replicas[0].tally.prefill_ns


@pytest.mark.parametrize("gbps", [12e9, 25e9])
def test_on_an_idle_gpu_offloading_costs_a_prompt_nothing(gbps: float) -> None:
    machine = presets.load_machine("h200")
    link = machine.link.with_fields(h2d_bytes_per_s=gbps, d2h_bytes_per_s=gbps).model_dump()
    scene = clo_sim.make_scene("llama-3-8b", machine.with_fields(link=link), context_tokens=65536, batch=1)
    trace = trace_of([(0, 65536, 10)])
    kept, offloaded = (worker_costs(scene, presets.load_design(name), trace) for name in ("resident", "clo"))
    assert offloaded.alone_ns(65536) == pytest.approx(kept.alone_ns(65536), rel=1e-3)
    # with no memory to spare the same prompt waits for the link
    assert offloaded.prefill.alone_ns(65536) > 1.02 * offloaded.alone_ns(65536)
