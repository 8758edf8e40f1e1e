"""What holds for every named design at a size where transfers matter."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executor_oracles import (
    DESIGNS,
    inward_bytes,
    lane_sums,
    timeline_of,
    without_contention,
)

import clo_sim
from clo import presets
from clo.profile import (
    FixedCost,
)
from clo.schedule import Lane
from clo.timeline import load_chrome_trace, save_chrome_trace
from clo_sim.clock import run_clock, step_seconds
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy


@pytest.mark.parametrize("name", DESIGNS)
class TestNamedDesigns:
    """The presets on a real model and machine."""

    def test_clock_equals_simulator_without_contention(self, scene: Scene, name: str) -> None:
        priced = scene.priced(scene.plan(presets.load_design(name)))
        simulated = run_simpy(priced, contention=without_contention(priced))
        np.testing.assert_array_equal(simulated.seconds, run_clock(priced).seconds)

    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    def test_time_is_split_without_rest(self, scene: Scene, name: str, executor: Any) -> None:
        result = simulate(scene, name, executor=executor)
        parts = sum(result.busy_s.values()) + result.contention_s + result.total_stall_s
        assert parts == pytest.approx(result.tpot_s, rel=1e-9)
        assert min(result.stall_s.values()) >= 0
        assert result.contention_s >= -1e-12

    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    def test_timeline_moves_the_bytes_of_the_trace(self, scene: Scene, name: str, executor: str) -> None:
        plan = scene.plan(presets.load_design(name))
        priced, step = scene.priced(plan), 5
        timeline = timeline_of(priced, step, executor)
        assert inward_bytes(timeline) == pytest.approx(
            priced.traffic.fetched_pages[step].sum() * plan.page_bytes, rel=1e-12
        )
        returned = timeline.num_bytes("write_back") + timeline.num_bytes("append_kv")
        assert returned == pytest.approx(priced.traffic.write_back_pages[step].sum() * plan.page_bytes, rel=1e-12)

    def test_timeline_is_as_busy_as_the_result_says(self, scene: Scene, name: str) -> None:
        plan = scene.plan(presets.load_design(name))
        priced, step = scene.priced(plan), 5
        timeline, times = timeline_of(priced, step, "simpy"), run_simpy(priced)
        assert timeline.seconds == pytest.approx(times.seconds[step], rel=1e-9)
        for lane, busy in times.lane_busy.items():
            assert timeline.busy_s(lane.value) == pytest.approx(busy[step], rel=1e-9, abs=1e-12), lane
        waited = sum(span.waited_s for span in timeline.spans if span.lane == Lane.MAIN)
        ended = max(span.end_s for span in timeline.spans if span.lane == Lane.MAIN)
        assert waited + timeline.busy_s(Lane.MAIN) == pytest.approx(ended, rel=1e-9)

    def test_a_timeline_survives_its_file(self, scene: Scene, name: str, tmp_path: Path) -> None:
        timeline = timeline_of(scene.priced(scene.plan(presets.load_design(name))), 3, "simpy")
        save_chrome_trace(tmp_path / "step.json", [timeline])
        [again] = load_chrome_trace(tmp_path / "step.json")
        assert (again.title, again.lanes, len(again.spans)) == (timeline.title, timeline.lanes, len(timeline.spans))
        for one, other in zip(timeline.spans, again.spans, strict=True):
            assert (one.lane, one.name, one.layer, one.part) == (other.lane, other.name, other.layer, other.part)
            assert (one.start_s, one.end_s, one.num_bytes) == pytest.approx(
                (other.start_s, other.end_s, other.num_bytes)
            )
            assert dict(one.waits) == pytest.approx(dict(other.waits))

    def test_lanes_are_in_order_and_do_not_overlap(self, scene: Scene, name: str) -> None:
        timeline = timeline_of(scene.priced(scene.plan(presets.load_design(name))), 3, "simpy")
        for lane in timeline.lanes:
            spans = [span for span in timeline.spans if span.lane == lane]
            assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(spans)), lane

    def test_same_question_same_answer_bit_for_bit(self, scene: Scene, name: str) -> None:
        again = clo_sim.make_scene("llama-3-8b", workload=scene.workload)
        assert simulate(scene, name) == simulate(again, name)

    @pytest.mark.parametrize(
        ("root", "changes"),
        [
            ("link", {"h2d_bytes_per_s": 110e9, "d2h_bytes_per_s": 104e9}),
            ("profile", {"kernel_launch": FixedCost(seconds=0.0, source="assumed")}),
            ("profile", {"read_back": FixedCost(seconds=0.0, source="assumed")}),
            ("profile", {"stream_sync": FixedCost(seconds=0.0, source="assumed")}),
        ],
        ids=["faster link", "cheaper launch", "cheaper read-back", "cheaper sync"],
    )
    def test_nothing_faster_slows_a_step(self, scene: Scene, name: str, root: str, changes: dict[str, Any]) -> None:
        if root == "link":
            better = replace(scene, machine=scene.machine.with_fields(link=changes))
        else:
            better = replace(scene, profile=scene.profile.model_copy(update=changes))
        design = presets.load_design(name)
        before = step_seconds(scene.priced(scene.plan(design)))
        after = step_seconds(better.priced(better.plan(design)))
        assert np.all(after <= before * (1 + 1e-12))

    def test_fewer_pages_never_slow_a_step(self, scene: Scene, name: str) -> None:
        priced = scene.priced(scene.plan(presets.load_design(name)))
        traffic = priced.traffic
        fewer = replace(traffic, spec_pages=traffic.spec_pages * 0.5, demand_pages=traffic.demand_pages * 0.25)
        from clo_sim.priced import price_step

        better = step_seconds(price_step(priced.shape, priced.pricer, fewer))
        assert np.all(better <= step_seconds(priced) * (1 + 1e-12))

    def test_utilisation_and_lane_times_are_those_of_the_timelines(self, scene: Scene, name: str) -> None:
        plan, result = scene.plan(presets.load_design(name)), simulate(scene, name)
        priced = scene.priced(plan)
        timelines = [timeline_of(priced, step, "simpy") for step in range(priced.num_steps)]
        seconds = sum(timeline.seconds for timeline in timelines)
        assert result.tpot_s == pytest.approx(seconds / 12, rel=1e-9)
        for lane, busy in result.lane_busy_s.items():
            assert busy == pytest.approx(sum(one.busy_s(lane) for one in timelines) / 12, rel=1e-9, abs=1e-15), lane
        moved = sum(inward_bytes(timeline) for timeline in timelines)
        assert result.h2d_bytes_per_step == pytest.approx(moved / 12, rel=1e-12)
        assert result.h2d_utilisation == pytest.approx(moved / (seconds * 55e9), rel=1e-9)
        assert result.h2d_utilisation <= 1

    def test_operations_are_summed_over_layers_and_averaged_over_steps(self, scene: Scene, name: str) -> None:
        result, priced = simulate(scene, name), scene.priced(scene.plan(presets.load_design(name)))
        # the lanes' time alone is that of all operations
        assert sum(op.seconds for op in result.ops.values()) == pytest.approx(
            sum(float(seconds.mean()) for seconds in lane_sums(priced).values())
        )
        assert sum(op.calls for op in result.ops.values()) == len(priced.graph.nodes)
        assert sum(result.source_shares.values()) == pytest.approx(1.0)
