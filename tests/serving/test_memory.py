"""Admission, preemption and rejection by memory."""

from __future__ import annotations

import pytest
from toy_service import toy_costs, trace_of

import clo_sim
from clo import presets
from clo.plan import make_plan
from clo_sim.serving import (
    ServiceSettings,
    serve,
)
from clo_sim.serving.memory import memory_need, roomy, smallest_plan


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
