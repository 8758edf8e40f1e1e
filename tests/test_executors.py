"""Clock and simulator against mathematics: bounds, sums, limits and monotonicity, for any design."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from executor_oracles import (
    Handover,
    costly_profile,
    designs,
    handovers,
    inward_bytes,
    lane_sums,
    longest_path,
    slow_fluid_ends,
    timeline_of,
    tiny_priced,
    without_contention,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import random_trace, tiny_design, tiny_machine, tiny_scene

import clo_sim
from clo import presets
from clo.pricing import Demand
from clo.profile import (
    FixedCost,
    InterferenceCost,
)
from clo.schedule import Lane
from clo.specs import Design, LinkSpec
from clo_sim.clock import run_clock, step_seconds
from clo_sim.contention import Contention
from clo_sim.device import Device, LaneProgram
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy
from clo_sim.stand_in import DISTINCT_STEPS, TrafficSource


class TestOneStep:
    """What holds for any design, any order, any cost."""

    @given(designs(), st.integers(0, 20), handovers())
    @settings(max_examples=100, deadline=None)
    def test_the_clock_is_the_longest_path(self, design: Design, seed: int, handover: Handover) -> None:
        priced = tiny_priced(design, seed, handover)
        expected = [longest_path(priced, step) for step in range(priced.num_steps)]
        np.testing.assert_allclose(run_clock(priced).seconds, expected, rtol=1e-12)

    @given(designs(), st.integers(0, 20), st.integers(0, 5), handovers())
    @settings(max_examples=150, deadline=None)
    def test_the_simulator_is_the_slow_fluid_service(
        self, design: Design, seed: int, step: int, handover: Handover
    ) -> None:
        priced = tiny_priced(design, seed, handover)
        ends = slow_fluid_ends(priced, step, Contention(priced.pricer.interference))
        of_lane = {segment.lane: end for segment, end in zip(priced.segments, ends, strict=True)}
        times = run_simpy(priced)
        assert times.seconds[step] == pytest.approx(of_lane[Lane.LAUNCH], rel=1e-9)
        timeline = timeline_of(priced, step, "simpy")
        for lane, end in of_lane.items():
            ran = [span.end_s for span in timeline.spans if span.lane == lane]
            # a lane whose last operation takes no time has no span there
            assert max(ran, default=0.0) <= end * (1 + 1e-9)
        assert timeline.seconds == pytest.approx(of_lane[Lane.LAUNCH], rel=1e-9)

    @given(designs(), st.integers(0, 20), st.sampled_from(["clock", "simpy"]))
    @settings(max_examples=100, deadline=None)
    def test_time_is_split_without_rest(self, design: Design, seed: int, executor: Any) -> None:
        tiny = tiny_scene(random_trace(seed), profile=costly_profile())
        result = simulate(tiny, design, executor=executor)
        assert sum(result.busy_s.values()) + result.contention_s + result.total_stall_s == pytest.approx(result.tpot_s)
        assert min(result.stall_s.values()) >= -1e-12
        assert result.contention_s >= -1e-12

    @given(designs(), st.integers(0, 20), st.integers(0, 5), st.sampled_from(["clock", "simpy"]))
    @settings(max_examples=100, deadline=None)
    def test_every_byte_of_the_trace_moves_within_the_step(
        self, design: Design, seed: int, step: int, executor: str
    ) -> None:
        priced = tiny_priced(design, seed)
        timeline, traffic = timeline_of(priced, step, executor), priced.traffic
        assert inward_bytes(timeline) == pytest.approx(traffic.fetched_pages[step].sum() * 64)
        returned = timeline.num_bytes("write_back") + timeline.num_bytes("append_kv")
        assert returned == pytest.approx(traffic.write_back_pages[step].sum() * 64)
        # a step ends with every lane idle: the launching thread is the last to be done
        ended = max(span.end_s for span in timeline.spans if span.lane == Lane.LAUNCH)
        assert timeline.seconds == ended
        times = run_clock(priced) if executor == "clock" else run_simpy(priced)
        assert ended == pytest.approx(times.seconds[step], rel=1e-12)

    @given(designs(), st.integers(0, 20))
    @settings(max_examples=120, deadline=None)
    def test_longest_lane_and_sum_of_all_bound_a_step(self, design: Design, seed: int) -> None:
        priced = tiny_priced(design, seed)
        sums = lane_sums(priced)
        longest, everything = np.max(list(sums.values()), axis=0), np.sum(list(sums.values()), axis=0)
        for seconds in (run_clock(priced).seconds, run_simpy(priced).seconds):
            assert np.all(seconds >= longest * (1 - 1e-12))
            assert np.all(seconds <= everything * (1 + 1e-12))

    @given(designs(), st.integers(0, 20), handovers())
    @settings(max_examples=120, deadline=None)
    def test_clock_and_simulator_agree_where_nothing_contends(
        self, design: Design, seed: int, handover: Handover
    ) -> None:
        priced = tiny_priced(design, seed, handover)
        clock, simulated = run_clock(priced), run_simpy(priced, contention=without_contention(priced))
        np.testing.assert_array_equal(simulated.seconds, clock.seconds)
        np.testing.assert_array_equal(step_seconds(priced), clock.seconds)
        for cause, gaps in clock.gaps.items():
            np.testing.assert_allclose(simulated.gaps[cause], gaps, rtol=1e-12, atol=1e-12, err_msg=cause)

    @given(designs(), st.integers(0, 20), handovers())
    @settings(max_examples=60, deadline=None)
    def test_work_and_gaps_of_the_main_stream_are_the_step(self, design: Design, seed: int, handover: Handover) -> None:
        priced = tiny_priced(design, seed, handover)
        for times in (run_clock(priced), run_simpy(priced)):
            accounted = times.main_busy + np.sum(list(times.gaps.values()), axis=0)
            np.testing.assert_allclose(accounted, times.seconds, rtol=1e-9)

    @given(designs(), st.integers(0, 20))
    @settings(max_examples=60, deadline=None)
    def test_contention_only_ever_delays_the_devices_own_lanes(self, design: Design, seed: int) -> None:
        priced = tiny_priced(design, seed)
        alone, simulated = lane_sums(priced), run_simpy(priced)
        for lane, busy in simulated.lane_busy.items():
            assert np.all(busy >= alone[lane] * (1 - 1e-9)), lane
        # lanes are in order and no operation gets faster, so delays only add up (max-plus monotonicity)
        assert np.all(simulated.seconds >= run_clock(priced).seconds * (1 - 1e-9))

    @given(designs(), st.integers(0, 5), st.data())
    @settings(max_examples=60, deadline=None)
    def test_no_shorter_operation_slows_a_step_on_the_clock(
        self, design: Design, seed: int, data: st.DataObject
    ) -> None:
        priced = tiny_priced(design, seed)
        before = step_seconds(priced)
        shares = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=8))
        shorter = priced.durations * np.resize(shares, len(priced.segments))[:, None]
        priced.__dict__["durations"] = shorter
        assert np.all(step_seconds(priced) <= before * (1 + 1e-12))

    def test_a_shorter_operation_may_slow_a_step_where_links_are_shared(self) -> None:
        """Why the clock is monotone in every duration and the simulator is not: an overlap that was not there before.

        A page gather that ends before the other stream's transfer begins runs alone; begun earlier, because a kernel
        before it got faster, the other transfer halves it, and what waits for the gather comes later.
        """
        demands = [Demand(), Demand(h2d=1.0, sms_taken=0.1)]
        rules = Contention(InterferenceCost(per_sm_share=0.0, dma=0.0, source="assumed"))

        def step(kernel: float) -> float:
            # main: gather 4 s, then attention 10 s; prefetch: kernel, then gather 8 s
            programs = [
                LaneProgram((1, 0), ((), ()), ((1, 0), (0, 0)), ((), ()), (0, 1)),
                LaneProgram((0, 1), ((), ()), ((1, 0), (0, 0)), ((), ()), (2, 3)),
            ]
            rates = lambda classes: rules.rates(tuple(demands[number] for number in classes))  # noqa: E731
            device = Device(programs, rates, watched=0, num_causes=1)
            device.begin_step(0.0, [4.0, 10.0, kernel, 8.0])
            device.submit(0.0)
            return max(device.run_until(1, 2), device.run_until(0, 2))

        # kernel 4: gather 0-4 alone, attention 4-14, prefetch 4-12
        assert step(4.0) == 14.0
        # kernel 2: gather alone for 2 s, then halved: 2-6; attention 6-16
        assert step(2.0) == 16.0


@pytest.mark.parametrize("executor", ["clock", "simpy"])
def test_until_it_is_launched_an_operation_waits_for_nothing_else(scene: Scene, executor: str) -> None:
    """The launching thread reads back who missed, then launches the copy and the attention that waits for it."""
    timeline = timeline_of(scene.priced(scene.plan(presets.load_design("recall"))), 5, executor)
    causes = [[cause for cause, _ in span.waits] for span in timeline.spans if span.name == "attention"]
    assert ["sync", "on-demand transfer"] in causes
    assert not any(found[0] == "on-demand transfer" for found in causes if found)


@pytest.mark.parametrize("executor", ["clock", "simpy"])
@pytest.mark.parametrize("name", ["clo-v1", "clo-v2"])
def test_waits_of_operations_that_take_no_time_are_not_lost(scene: Scene, name: str, executor: str) -> None:
    free = scene.profile.model_copy(update={"ready_flag": FixedCost(seconds=0.0, source="assumed")})
    priced = replace(scene, profile=free).priced(scene.plan(presets.load_design(name)))
    main = [span for span in timeline_of(priced, 5, executor).spans if span.lane == Lane.MAIN]
    busy_s = sum(span.end_s - span.start_s for span in main)
    assert busy_s + sum(span.waited_s for span in main) == pytest.approx(max(span.end_s for span in main))


class TestLongRuns:
    """Memory does not grow with steps: those beyond the distinct ones repeat them."""

    def peak_bytes(self, design: Design, steps: int, executor: str) -> int:
        trace = random_trace(3, steps=DISTINCT_STEPS)
        source = TrafficSource(trace, repeat_steps=True)
        long = tiny_scene(trace, steps=steps, source=source)
        tracemalloc.start()
        clo_sim.simulate(long, design, executor="clock" if executor == "clock" else "simpy")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    @pytest.mark.parametrize(
        "design",
        [
            tiny_design(4, cache="lru"),
            tiny_design(4, attend="full", cache="none", slot_pages=None, transfer="page_copies"),
        ],
    )
    def test_memory_does_not_grow_with_steps(self, design: Design, executor: str) -> None:
        self.peak_bytes(design, DISTINCT_STEPS, executor)  # what is loaded or remembered once is not counted
        few, many = (self.peak_bytes(design, DISTINCT_STEPS * times, executor) for times in (1, 100))
        assert many < 1.1 * few

    def test_steps_beyond_the_trace_repeat_it_and_the_report_says_so(self) -> None:
        trace = random_trace(4)
        once = clo_sim.simulate(tiny_scene(trace), tiny_design(4, cache="lru"))
        source = TrafficSource(trace, repeat_steps=True)
        often = clo_sim.simulate(tiny_scene(trace, steps=600, source=source), tiny_design(4, cache="lru"))
        assert often.tpot_s == once.tpot_s
        assert often.h2d_bytes_per_step == once.h2d_bytes_per_step
        assert "6 steps are told apart, the others repeat them" in often.assumptions
        assert not any("repeat" in note for note in once.assumptions)


class TestLimits:
    """Where only one thing costs anything, the answer is known."""

    @given(designs())
    @settings(max_examples=60, deadline=None)
    def test_an_infinite_link_leaves_the_compute_bound_time(self, design: Design) -> None:
        # what is left then is the main stream: no CPU has a part in it, nothing is launched ahead
        assume(design.selects or not design.offloads)
        design = design.with_fields(
            transfer="gpu_zero_copy", resolve_on="gpu", prefetch_depth=0, prefetch_query="layer_ahead"
        )
        trace = random_trace(1)
        tiny = tiny_scene(trace, machine=tiny_machine(link=LinkSpec(h2d_bytes_per_s=1e30, d2h_bytes_per_s=1e30)))
        priced = tiny.priced(tiny.plan(design))
        main = lane_sums(priced)[Lane.MAIN]
        np.testing.assert_allclose(run_simpy(priced).seconds, main, rtol=1e-9)

    @pytest.mark.parametrize("transfer", ["page_copies", "gpu_zero_copy"])
    def test_an_empty_cache_on_a_slow_link_leaves_the_link_bound_time(self, transfer: str) -> None:
        trace = random_trace(2)
        slow = tiny_machine(link=LinkSpec(h2d_bytes_per_s=1e-6, d2h_bytes_per_s=1e30))
        tiny = tiny_scene(trace, machine=slow)
        result = simulate(tiny, tiny_design(4, cache="none", slot_pages=None, transfer=transfer, sync="events"))
        # 3 layers of 2 heads fetch 4 pages of 64 bytes
        assert result.h2d_bytes_per_step == 3 * 2 * 4 * 64
        assert result.tpot_s == pytest.approx(3 * 2 * 4 * 64 / 1e-6, rel=1e-6)

    def test_cache_size_moves_time(self, scene: Scene) -> None:
        slow = replace(scene, machine=scene.machine.with_fields(link={"h2d_bytes_per_s": 5e9, "d2h_bytes_per_s": 5e9}))
        results = [
            simulate(slow, presets.load_design("resolve").with_fields(slot_budgets=size)) for size in (1, 1.5, 2, 4)
        ]
        times, moved = [r.tpot_s for r in results], [r.h2d_bytes_per_step for r in results]
        assert times == sorted(times, reverse=True)
        assert moved == sorted(moved, reverse=True)
        # on a slow link time follows bytes: what the smaller cache saves in bytes it saves in time
        saved = (moved[0] - moved[-1]) / 5e9
        assert times[0] - times[-1] == pytest.approx(saved, rel=0.02)

    def test_streaming_everything_takes_bytes_over_link(self) -> None:
        full = clo_sim.make_scene("llama-3-8b", context_tokens=131072, batch=16)
        result = simulate(full, "streamed")
        assert result.h2d_bytes_per_step == 32 * 16 * 131072 * 4096
        assert result.tpot_s == pytest.approx(result.h2d_bytes_per_step / 55e9, rel=0.01)

    def test_another_seed_is_another_draw(self, scene: Scene) -> None:
        other = replace(scene, workload=scene.workload.with_fields(seed=1))
        assert simulate(scene, "clo").tpot_s != simulate(other, "clo").tpot_s
