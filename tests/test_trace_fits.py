"""Questions that a trace cannot answer are refused."""

from __future__ import annotations

import pytest
from tiny import make_trace, random_trace, tiny_design, tiny_scene

from clo.errors import SpecError, TraceError
from clo.plan import make_plan
from clo_sim.stand_in import TrafficSource


class TestTraceFits:
    def test_another_head_count_is_refused_unless_allowed(self) -> None:
        trace = random_trace(0)
        scene = tiny_scene(trace)
        other = scene.model.with_fields(num_query_heads=4, num_kv_heads=4)
        plan = make_plan(other, scene.machine, tiny_design(4), scene.workload)
        with pytest.raises(TraceError, match=r"3 layers x 2 KV heads, but tiny has 3 x 4.*--resample-heads"):
            TrafficSource(trace, resample_heads=False).traffic(plan)
        assert TrafficSource(trace).traffic(plan).num_steps == 6

    def test_more_steps_than_recorded(self) -> None:
        scene = tiny_scene(random_trace(0), steps=7)
        with pytest.raises(SpecError, match=r"workload\.steps = 7: .* the 6 recorded steps"):
            scene.source.traffic(scene.plan(tiny_design(4)))

    def test_a_budget_that_was_not_recorded(self) -> None:
        scene = tiny_scene(random_trace(0))
        with pytest.raises(TraceError, match="records only the best 4 of 16 pages"):
            scene.source.traffic(scene.plan(tiny_design(8)))

    def test_a_lookahead_that_was_not_recorded(self) -> None:
        scene = tiny_scene(make_trace([[[[1, 2]], [[1, 2]], [[1, 2]]]]))
        with pytest.raises(TraceError, match=r"design\.prefetch_depth = 2: the trace recorded lookaheads \[1\]"):
            scene.source.traffic(scene.plan(tiny_design(2, prefetch_depth=2)))
