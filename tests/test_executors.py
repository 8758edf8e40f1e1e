"""Clock and simulator against mathematics: bounds, sums, limits, monotonicity, and timelines worked out by hand.

The clock is held to the longest path through the recorded operations, the simulator to a slow fluid service of the same
step that knows no device, no fast path and no SimPy.
"""

from __future__ import annotations

import math
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import make_trace, random_trace, tiny_design, tiny_machine, tiny_profile, tiny_scene

import clo_sim
from clo import presets
from clo.pricing import Demand, Pricer
from clo.profile import (
    BookkeepingCost,
    CopyCost,
    FixedCost,
    InterferenceCost,
    StreamCost,
    SubmitCost,
    ThreadCost,
    ZeroCopyCost,
)
from clo.schedule import Lane
from clo.schedule.work import (
    BarWrite,
    Bookkeeping,
    Copy,
    DecodeAttention,
    Gemm,
    HostAction,
    HostGather,
    StreamKernel,
    Submit,
    ZeroCopy,
)
from clo.specs import Design, HostSpec, LinkSpec
from clo.timeline import Timeline, load_chrome_trace, save_chrome_trace
from clo_sim.clock import run_clock, step_seconds
from clo_sim.contention import Contention
from clo_sim.device import Device, LaneProgram
from clo_sim.priced import PricedStep
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy
from clo_sim.stand_in import DISTINCT_STEPS, TrafficSource
from clo_sim.unfold import clock_timeline, simulated_timeline

DESIGNS = presets.names("designs")
TRANSFERS = ("page_copies", "staged", "cpu_zero_copy", "gpu_zero_copy")
SYNCS = ("host", "events", "flags", "graph")


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Four sequences of 32K tokens of Llama-3-8B on an H200: every design fits, transfers matter."""
    return clo_sim.make_scene(
        "llama-3-8b", workload=clo_sim.make_scene().workload.with_fields(context_tokens=32768, batch=4, steps=12)
    )


def without_contention(priced: PricedStep) -> Contention:
    return Contention(priced.pricer.interference, share_links=False, interfere=False)


def designs() -> st.SearchStrategy[Design]:
    """Valid combinations of every choice that decides the order of a step."""

    def build(choices: dict[str, Any]) -> Design | None:
        if choices["attend"] == "full":
            choices = choices | {"pinned_head_fraction": 0.0, "transfer": "page_copies"}
        try:
            return tiny_design(4, **choices)
        except ValueError:
            return None

    fields = st.fixed_dictionaries(
        {
            "attend": st.sampled_from(["sparse"] * 5 + ["full"]),
            "cache": st.sampled_from(["none", "none", "lru", "lru", "head_reuse", "resident"]),
            "on_miss": st.sampled_from(["diff", "replace"]),
            "prefetch_depth": st.sampled_from([0, 1, 2]),
            "prefetch_query": st.sampled_from(["layer_ahead", "layer_ahead", "previous_step"]),
            "transfer": st.sampled_from(TRANSFERS),
            "sync": st.sampled_from(SYNCS),
            "resolve_on": st.sampled_from(["gpu", "cpu"]),
            "dense_layers": st.sampled_from([0, 1]),
            "pinned_head_fraction": st.sampled_from([0.0, 0.5]),
            "slot_pages": st.sampled_from([4, 7]),
        }
    )
    return fields.map(build).filter(lambda design: design is not None)


def costly_profile() -> Any:
    """Costs that make every kind of wait matter in the tiny world."""
    cost = {"source": "assumed"}
    return tiny_profile(
        **{name: FixedCost(seconds=0.125, **cost) for name in ("kernel_launch", "graph_launch", "thread_wake")},
        **{name: FixedCost(seconds=0.5, **cost) for name in ("stream_sync", "read_back", "doorbell", "ready_flag")},
        interference=InterferenceCost(per_sm_share=0.5, dma=0.25, **cost),
    )


class HandingOver:
    """Prices of a machine whose lanes see what others have done some time later."""

    def __init__(self, prices: Any, handover_s: dict[Lane, float]) -> None:
        self.prices, self.handover_s = prices, handover_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prices, name)


def tiny_priced(design: Design, seed: int = 0, handover_s: dict[Lane, float] | None = None) -> PricedStep:
    trace = random_trace(seed)
    tiny = tiny_scene(trace, profile=costly_profile())
    priced = tiny.priced(tiny.plan(design))
    return replace(priced, pricer=HandingOver(priced.pricer, handover_s or {}))


def handovers() -> st.SearchStrategy[dict[Lane, float]]:
    """By lane: none, less than any operation takes, and more than most."""
    return st.dictionaries(st.sampled_from(list(Lane)), st.sampled_from([0.0625, 0.7]))


def lane_sums(priced: PricedStep) -> dict[Lane, Any]:
    sums: dict[Lane, Any] = defaultdict(lambda: np.zeros(priced.num_steps))
    for segment, seconds in zip(priced.segments, priced.durations, strict=True):
        sums[segment.lane] = sums[segment.lane] + seconds
    return sums


def longest_path(priced: PricedStep, step: int) -> float:
    """When the launching thread is done: the longest path through single operations, without segments."""
    ends: list[float] = []
    lane_end: dict[Lane, float] = defaultdict(float)
    for node in priced.graph.nodes:
        seconds = priced.seconds(node.op)
        alone = float(seconds) if np.ndim(seconds) == 0 else float(seconds[step])
        ready = [ends[wait.node] + priced.handover_s.get(node.lane, 0.0) for wait in node.after]
        lane_end[node.lane] = max([lane_end[node.lane], *ready]) + alone
        ends.append(lane_end[node.lane])
    return lane_end[Lane.LAUNCH]


def slow_fluid_ends(priced: PricedStep, step: int, rules: Contention) -> list[float]:
    """End of every segment when all lanes, the launching thread among them, are served side by side.

    Written apart from the simulator: work left is counted down from one event to the next, nothing is looked up.
    """
    segments, shares = priced.segments, ("h2d", "d2h", "hbm", "host_memory")
    # demands that agree to a percent contend alike
    demands = [
        replace(demand, **{name: round(getattr(demand, name), 2) for name in shares}) for demand in priced.demands
    ]
    queues = {lane: [n for n, segment in enumerate(segments) if segment.lane is lane] for lane in priced.graph.lanes()}
    left: dict[int, float] = {}
    ends: dict[int, float] = {}
    now = 0.0
    while len(ends) < len(segments):
        due = [math.inf]
        for number in (queue[0] for queue in queues.values() if queue and queue[0] not in left):
            if all(wait.segment in ends for wait in segments[number].after):
                later = priced.handover_s.get(segments[number].lane, 0.0)
                seen = max([now, *(ends[wait.segment] + later for wait in segments[number].after)])
                if seen > now:
                    due.append(seen)
                else:
                    left[number] = float(priced.durations[number, step])
        rates = dict(zip(left, rules.rates(tuple(demands[number] for number in left)), strict=True))
        soonest = min(left, key=lambda number: left[number] / rates[number], default=None)
        until = now + left[soonest] / rates[soonest] if soonest is not None else math.inf
        if min(due) < until:
            soonest, until = None, min(due)
        left = {number: work - (until - now) * rates[number] for number, work in left.items() if number != soonest}
        now = until
        if soonest is not None:
            ends[soonest] = now
            queues[segments[soonest].lane].pop(0)
    return [ends[number] for number in range(len(segments))]


class TestOneStep:
    """What holds for any design, any order, any cost."""

    @given(designs(), st.integers(0, 20), handovers())
    @settings(max_examples=100, deadline=None)
    def test_the_clock_is_the_longest_path(self, design: Design, seed: int, handover_s: dict[Lane, float]) -> None:
        priced = tiny_priced(design, seed, handover_s)
        expected = [longest_path(priced, step) for step in range(priced.num_steps)]
        np.testing.assert_allclose(run_clock(priced).seconds, expected, rtol=1e-12)

    @given(designs(), st.integers(0, 20), st.integers(0, 5), handovers())
    @settings(max_examples=150, deadline=None)
    def test_the_simulator_is_the_slow_fluid_service(
        self, design: Design, seed: int, step: int, handover_s: dict[Lane, float]
    ) -> None:
        priced = tiny_priced(design, seed, handover_s)
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
        self, design: Design, seed: int, handover_s: dict[Lane, float]
    ) -> None:
        priced = tiny_priced(design, seed, handover_s)
        clock, simulated = run_clock(priced), run_simpy(priced, contention=without_contention(priced))
        np.testing.assert_array_equal(simulated.seconds, clock.seconds)
        np.testing.assert_array_equal(step_seconds(priced), clock.seconds)
        for cause, gaps in clock.gaps.items():
            np.testing.assert_allclose(simulated.gaps[cause], gaps, rtol=1e-12, atol=1e-12, err_msg=cause)

    @given(designs(), st.integers(0, 20), handovers())
    @settings(max_examples=60, deadline=None)
    def test_work_and_gaps_of_the_main_stream_are_the_step(
        self, design: Design, seed: int, handover_s: dict[Lane, float]
    ) -> None:
        priced = tiny_priced(design, seed, handover_s)
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


def inward_bytes(timeline: Timeline) -> float:
    """Bytes host to device, by whichever engine."""
    return sum(timeline.num_bytes(op) for op in ("gather_pages", "copy_pages", "copy_staged", "bar_write"))


def timeline_of(priced: PricedStep, step: int, executor: str) -> Timeline:
    unfold = clock_timeline if executor == "clock" else simulated_timeline
    return unfold(priced, step, "test")


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


def spans(timeline: Timeline, lane: Lane) -> list[tuple[str, int, float, float]]:
    """Everything that takes a measurable time on a lane."""
    found = [span for span in timeline.spans if span.lane == lane and span.end_s - span.start_s > 1e-6]
    return [(span.name, span.layer, round(span.start_s, 6), round(span.end_s, 6)) for span in found]


class TestPrices:
    """One cost at a time on the tiny machine: link 64 bytes/s, device memory 1e12 bytes/s, four CPU threads."""

    threads = ThreadCost(per_piece_s=1.0, bytes_per_s_per_thread=64.0, link_share=0.5, source="assumed")
    pricer = Pricer(
        tiny_profile(
            elementwise=StreamCost(latency_s=0.25, efficiency=0.5, source="assumed"),
            zero_copy=ZeroCopyCost(latency_s=2.0, in_flight_bytes_per_cta=8.0, round_trip_s=1.0, source="assumed"),
            copy_h2d=CopyCost(latency_s=1.0, piece_bytes=[16.0, 64.0], bytes_per_s=[8.0, 32.0], source="assumed"),
            submit=SubmitCost(per_call_s=0.5, per_descriptor_s=0.125, source="assumed"),
            host_gather=threads,
            bar_write=threads,
            bookkeeping=BookkeepingCost(per_head_s=1.0, per_page_s=0.5, source="assumed"),
            read_back=FixedCost(seconds=0.5, source="assumed"),
        ),
        tiny_machine(),
    )

    @pytest.mark.parametrize(
        ("work", "seconds"),
        [
            # half of 1e12 bytes/s; two pages stored to the host take a second each
            (StreamKernel("elementwise", 1e12), 2.25),
            (StreamKernel("elementwise", 1e12, 128.0), 4.25),
            # four blocks keep 32 bytes/s in flight, sixteen more than the link takes; an empty list is a small kernel
            (ZeroCopy(128.0, 4), 2.0 + 4.0),
            (ZeroCopy(128.0, 16), 2.0 + 2.0),
            (ZeroCopy(0.0, 16), 0.25),
            # rates of the table at its ends, beyond them, and halfway in the logarithm; nothing to copy costs nothing
            (Copy("h2d", 4.0, 64.0), 1.0 + 8.0),
            (Copy("h2d", 4.0, 256.0), 1.0 + 32.0),
            (Copy("h2d", 4.0, 8.0), 1.0 + 4.0),
            (Copy("h2d", 5.0, 32.0), 1.0 + 8.0),
            (Copy("h2d", 0.0, 64.0), 0.0),
            (Copy("d2h", 2.0, 64.0), 2.0),
            (Submit(4.0), 1.0),
            (Submit(0.0), 0.0),
            # a thread needs 2 s for a piece of 64 bytes; there are four threads; writes reach half the link
            (HostGather(4.0, 64.0, 2), 4.0),
            (HostGather(4.0, 64.0, 100), 2.0),
            (BarWrite(1.0, 64.0, 1), 2.0),
            (BarWrite(4.0, 64.0, 4), 8.0),
            (Bookkeeping(2.0, 4.0, 2), 2.0),
            (Bookkeeping(2.0, 4.0, 100), 1.0),
            (HostAction("read_back", 3), 1.5),
            (Gemm(1, 4, 4), 1.0),
            (DecodeAttention(1, 16, 2, 2, 2), 2.0),
        ],
        ids=str,
    )
    def test_by_hand(self, work: Any, seconds: float) -> None:
        nothing: Any = None
        assert self.pricer.seconds(work, nothing) == pytest.approx(seconds, rel=1e-9)

    def test_gathering_reads_and_writes_each_byte(self) -> None:
        host = HostSpec(memory_bytes=1e9, memory_bytes_per_s=100.0, num_threads=4)
        slow = Pricer(self.pricer.profile, tiny_machine(host=host))
        nothing: Any = None
        assert slow.seconds(HostGather(4.0, 64.0, 4), nothing) == pytest.approx(4 * 64 / 50)


class TestByHand:
    """Two layers of two heads. A GEMM takes 1 s, attention 2 s, a small kernel 0.25 s, a page 1 s on the link."""

    def test_resolve(self) -> None:
        # step 0 finds 7 and 8 in the slots in layer 0 and nothing in layer 1, where two heads fetch a page each
        pages = [[[[9, 10], [9, 10]], [[10, 1], [10, 1]]]]
        tiny = tiny_scene(make_trace(pages))
        priced = tiny.priced(tiny.plan(tiny_design(2, cache="lru", sync="graph", selector="exact")))
        layer = [
            ("input_norm", 0.25),
            ("qkv_proj", 1.0),
            ("append_kv", 0.25),
            ("score_pages", 0.25),
            ("select_pages", 0.25),
            ("resolve_pages", 0.25),
            ("gather_pages", 0.25),
            ("attention", 2.0),
            ("out_proj", 1.0),
            ("post_norm", 0.25),
            ("gate_up_proj", 1.0),
            ("activation", 0.25),
            ("down_proj", 1.0),
        ]
        expected, now = [], 0.0
        for number in range(2):
            for name, seconds in layer:
                # in layer 1 the kernel moves two pages instead of finding an empty list
                seconds = 2.0 if (name, number) == ("gather_pages", 1) else seconds
                # a page of the window goes back to the host in step 0: 2 heads, 64 bytes each, one second each
                seconds = 2.25 if name == "append_kv" else seconds
                expected.append((name, number, round(now, 6), round(now + seconds, 6)))
                now += seconds
        for name, seconds in (("final_norm", 0.25), ("lm_head", 1.0), ("sample", 0.25)):
            expected.append((name, 1, round(now, 6), round(now + seconds, 6)))
            now += seconds
        for unfold in (clock_timeline, simulated_timeline):
            assert spans(unfold(priced, 0, "test"), Lane.MAIN) == expected

    def test_staged_by_the_host(self) -> None:
        # no cache, nothing predicted: select, gather by 1 thread (4 pages, 4 s), copy (4 s), then attention
        pages = [[[[1, 2], [3, 4]], [[1, 2], [3, 4]]]]
        tiny = tiny_scene(make_trace(pages))
        design = tiny_design(
            2, cache="none", slot_pages=None, transfer="staged", transfer_threads=1, sync="host", selector="exact"
        )
        timeline = clock_timeline(tiny.priced(tiny.plan(design)), 0, "test")
        # norm 0.25, qkv 1, append 0.25, score 0.25, select 0.25 -> 2; gather 2-6; copy 6-10; attention 10-12,
        # out 1, norm 0.25, gate_up 1, activation 0.25, down 1 -> 15.5; the same again from there
        assert spans(timeline, Lane.POOL) == [("host_gather", 0, 2.0, 6.0), ("host_gather", 1, 17.5, 21.5)]
        assert spans(timeline, Lane.H2D) == [("copy_staged", 0, 6.0, 10.0), ("copy_staged", 1, 21.5, 25.5)]
        attention = [span for span in spans(timeline, Lane.MAIN) if span[0] == "attention"]
        assert attention == [("attention", 0, 10.0, 12.0), ("attention", 1, 25.5, 27.5)]
        # the page that leaves the window goes back while the selection runs: 2 heads, a second each, from append's end
        assert spans(timeline, Lane.D2H) == [("write_back", 0, 1.5, 3.5), ("write_back", 1, 17.0, 19.0)]

    def test_prefetch_under_the_layer_before(self) -> None:
        # layer 1's pages (4 s) are chosen after layer 0's projection and arrive while layer 0 computes
        pages = [[[[9, 10], [9, 10]], [[1, 2], [3, 4]]]]
        tiny = tiny_scene(make_trace(pages))
        design = tiny_design(2, cache="lru", prefetch_depth=1, sync="graph", selector="exact")
        timeline = clock_timeline(tiny.priced(tiny.plan(design)), 0, "test")
        # norm and projection end at 1.25: score, select, resolve -> 2; four pages -> 6
        assert spans(timeline, Lane.PREFETCH) == [
            ("prefetch.score_pages", 1, 1.25, 1.5),
            ("prefetch.select_pages", 1, 1.5, 1.75),
            ("prefetch.resolve_pages", 1, 1.75, 2.0),
            ("prefetch.gather_pages", 1, 2.0, 6.0),
        ]
        waits = [span.waits for span in timeline.spans if span.lane == Lane.MAIN and span.waits]
        assert waits == []

    MLP = (("out_proj", 1.0), ("post_norm", 0.25), ("gate_up_proj", 1.0), ("activation", 0.25), ("down_proj", 1.0))

    def scene_of_clo(self, demanded: list[int]) -> tuple[PricedStep, Design]:
        """Head reuse in a graph whose launch takes 0.5 s; a page takes 4 s. Layer 1 predicts what it then asks for."""
        pages = [[[demanded, [9, 10]], [[1, 2], [3, 4]]]]
        link = LinkSpec(h2d_bytes_per_s=16.0, d2h_bytes_per_s=64.0)
        profile = tiny_profile(graph_launch=FixedCost(seconds=0.5, source="assumed"))
        tiny = tiny_scene(make_trace(pages), machine=tiny_machine(link=link), profile=profile)
        design = tiny_design(2, cache="head_reuse", prefetch_depth=1, sync="graph", transfer="gpu_zero_copy")
        return tiny.priced(tiny.plan(design)), design

    def test_clo_with_a_late_prefetch(self) -> None:
        priced, _ = self.scene_of_clo(demanded=[9, 10])
        timeline = clock_timeline(priced, 0, "test")
        # layer 0's projection ends at 1.75; test, score, select, resolve of layer 1 take 1 s, its four pages 16 s
        assert spans(timeline, Lane.PREFETCH) == [
            ("prefetch.hit_test", 1, 1.75, 2.0),
            ("prefetch.score_pages", 1, 2.0, 2.25),
            ("prefetch.select_pages", 1, 2.25, 2.5),
            ("prefetch.resolve_pages", 1, 2.5, 2.75),
            ("prefetch.gather_pages", 1, 2.75, 18.75),
        ]
        # both heads of layer 0 find 9 and 10; append_kv stores two pages to the host (2 s); layer 1 asks for nothing
        # beyond its prediction; its gather writes to slots only when that has come
        layer = (
            ("input_norm", 0.25),
            ("qkv_proj", 1.0),
            ("append_kv", 2.25),
            ("hit_test", 0.25),
            ("score_pages", 0.25),
            ("select_pages", 0.25),
            ("resolve_pages", 0.25),
            ("gather_pages", 0.25),
            ("attention", 2.0),
            *self.MLP,
        )
        expected, now = [], 0.5
        for number in (0, 1):
            for name, seconds in layer:
                if (name, number) == ("gather_pages", 1):
                    assert now == 15.25
                    now = 18.75
                expected.append((name, number, now, now + seconds))
                now += seconds
        for name, seconds in (("final_norm", 0.25), ("lm_head", 1.0), ("sample", 0.25)):
            expected.append((name, 1, now, now + seconds))
            now += seconds
        assert now == 26.0
        assert spans(timeline, Lane.MAIN) == expected
        waits = [(span.name, span.cause, span.waited_s) for span in timeline.spans if span.waited_s > 1e-6]
        assert [wait for wait in waits if not wait[0].startswith("prefetch")] == [
            ("input_norm", "launch", 0.5),
            ("gather_pages", "late prefetch", pytest.approx(3.5)),
        ]
        assert run_clock(priced).seconds[0] == pytest.approx(26.0)

    def test_a_real_query_waits_until_the_prediction_has_settled(self) -> None:
        # scoring takes 20 s. Layer 0 is dense: norm 0.25, projection 1.25, append 1.5, attention 3.5, MLP 7; layer 1's
        # norm 7.25, projection 8.25, append 10.5. Its prediction starts at 1.25: test 1.5, score 21.5, select 21.75,
        # resolve 22; the real query is tested from then on
        profile = tiny_profile(score_pages=StreamCost(latency_s=20.0, efficiency=1.0, source="assumed"))
        tiny = tiny_scene(make_trace([[[[1, 2], [3, 4]], [[1, 2], [3, 4]]]]), profile=profile)
        design = tiny_design(2, cache="head_reuse", prefetch_depth=1, dense_layers=1)
        timeline = clock_timeline(tiny.priced(tiny.plan(design)), 0, "test")
        assert ("prefetch.resolve_pages", 1, 21.75, 22.0) in spans(timeline, Lane.PREFETCH)
        assert ("hit_test", 1, 22.0, 22.25) in spans(timeline, Lane.MAIN)
        [tested] = [span for span in timeline.spans if span.name == "hit_test"]
        assert (tested.cause, tested.waited_s) == ("late prefetch", pytest.approx(11.5))
        # score 42.25, select 42.5, resolve 42.75, an empty list 43; the pages came 22 to 26
        assert ("attention", 1, 43.0, 45.0) in spans(timeline, Lane.MAIN)

    def test_a_gather_on_the_main_stream_is_a_stall_on_demand(self) -> None:
        tiny = tiny_scene(make_trace([[[[1, 2], [9, 10]], [[9, 10], [9, 10]]]]))
        result = simulate(tiny, tiny_design(2, cache="lru"), executor="clock")
        # two pages in layer 0, an empty list in layer 1
        stalls = {cause: seconds for cause, seconds in result.stall_s.items() if seconds > 1e-6}
        assert stalls == pytest.approx({"on-demand transfer": 2.25})

    def test_clo_while_a_demand_and_a_prefetch_share_the_link(self) -> None:
        priced, _ = self.scene_of_clo(demanded=[1, 2])
        alone, shared = clock_timeline(priced, 0, "test"), simulated_timeline(priced, 0, "test")
        # head A of layer 0 fetches two pages on demand (8 s) from 5 on, while layer 1's four pages move since 2.75
        assert ("gather_pages", 0, 5.0, 13.0) in spans(alone, Lane.MAIN)
        assert ("prefetch.gather_pages", 1, 2.75, 18.75) in spans(alone, Lane.PREFETCH)
        # together at half speed: 8 s of work take 16; of the prefetch's 16 s, 2.25 are done alone, 8 beside the demand
        # gather, 5.75 alone again
        assert ("gather_pages", 0, 5.0, 21.0) in spans(shared, Lane.MAIN)
        assert ("prefetch.gather_pages", 1, 2.75, 26.75) in spans(shared, Lane.PREFETCH)
        # attention 21-23, the MLP until 26.5, layer 1's norm 26.75, projection 27.75, append 30, selection 31, an empty
        # list 31.25: the prefetch is there
        assert ("attention", 1, 31.25, 33.25) in spans(shared, Lane.MAIN)
        # the MLP until 36.75, then norm, head, sample
        assert run_simpy(priced).seconds[0] == pytest.approx(38.25)

    def test_staged_with_prefetch_and_a_thread_that_pays_for_launches(self) -> None:
        cost = {"source": "assumed"}
        profile = tiny_profile(
            kernel_launch=FixedCost(seconds=0.125, **cost),
            submit=SubmitCost(per_call_s=0.5, per_descriptor_s=0.0, **cost),
            read_back=FixedCost(seconds=1.0, **cost),
            stream_sync=FixedCost(seconds=1.0, **cost),
            thread_wake=FixedCost(seconds=0.25, **cost),
        )
        tiny = tiny_scene(make_trace([[[[1, 2], [3, 4]], [[1, 2], [3, 4]]]]), profile=profile)
        design = tiny_design(
            2, cache="none", slot_pages=None, prefetch_depth=1, transfer="staged", transfer_threads=1, sync="host"
        )
        priced = tiny.priced(tiny.plan(design))
        for unfold in (clock_timeline, simulated_timeline):
            timeline = unfold(priced, 0, "test")
            # launches: norm 0.125, projection 0.25, append 0.375, write-back 0.875, two for layer 1 until 1.125, two
            # for layer 0 until 1.375. Layer 0's selection ends at 2.125; the thread reads it back until 3.125 and wakes
            # the gatherer until 3.375 (4 pages, 4 s), joins it until 7.625, submits until 8.125; the copy takes 4 s;
            # synchronising ends at 13.125, the launch of attention at 13.25. After six launches, at 13.875, layer 1's
            # selection is read back until 14.875: gather from 15.125, joined 19.375, copy from 19.875, synchronised
            # 24.875. Layer 1's norm is launched by 25.0.
            assert spans(timeline, Lane.MAIN) == [
                ("input_norm", 0, 0.125, 0.375),
                ("qkv_proj", 0, 0.375, 1.375),
                ("append_kv", 0, 1.375, 1.625),
                ("score_pages", 0, 1.625, 1.875),
                ("select_pages", 0, 1.875, 2.125),
                ("attention", 0, 13.25, 15.25),
                ("out_proj", 0, 15.25, 16.25),
                ("post_norm", 0, 16.25, 16.5),
                ("gate_up_proj", 0, 16.5, 17.5),
                ("activation", 0, 17.5, 17.75),
                ("down_proj", 0, 17.75, 18.75),
                ("input_norm", 1, 25.0, 25.25),
                ("qkv_proj", 1, 25.25, 26.25),
                ("append_kv", 1, 26.25, 26.5),
                ("attention", 1, 26.5, 28.5),
                ("out_proj", 1, 28.5, 29.5),
                ("post_norm", 1, 29.5, 29.75),
                ("gate_up_proj", 1, 29.75, 30.75),
                ("activation", 1, 30.75, 31.0),
                ("down_proj", 1, 31.0, 32.0),
                ("final_norm", 1, 32.0, 32.25),
                ("lm_head", 1, 32.25, 33.25),
                ("sample", 1, 33.25, 33.5),
            ]
            assert spans(timeline, Lane.PREFETCH) == [
                ("prefetch.score_pages", 1, 1.375, 1.625),
                ("prefetch.select_pages", 1, 1.625, 1.875),
            ]
            assert spans(timeline, Lane.POOL) == [
                ("host_gather", 0, 3.375, 7.375),
                ("prefetch.host_gather", 1, 15.125, 19.125),
            ]
            assert spans(timeline, Lane.H2D) == [
                ("copy_staged", 0, 8.125, 12.125),
                ("prefetch.copy_staged", 1, 19.875, 23.875),
            ]
            assert spans(timeline, Lane.D2H) == [("write_back", 0, 1.625, 3.625), ("write_back", 1, 26.5, 28.5)]
        # of 34.5 s: busy 16; the first launch 0.125; on demand 2.125 to 13.25; blocked on the prefetch 18.75 to 25; the
        # tokens' read-back 1
        for result in (simulate(tiny, design), simulate(tiny, design, executor="clock")):
            assert result.tpot_s == pytest.approx(34.5)
            stalls = {cause: seconds for cause, seconds in result.stall_s.items() if seconds > 1e-6}
            expected = {"launch": 0.125, "on-demand transfer": 11.125, "late prefetch": 6.25, "sync": 1.0}
            assert stalls == pytest.approx(expected)
            # two layers of norm, projection, append and MLP (5 s), then norm, head, sample (1.5 s)
            assert result.busy_s == pytest.approx({"model": 11.5, "attention": 4.0, "selection": 0.5})

    def test_flags_need_no_launching_thread(self) -> None:
        cost = {"source": "assumed"}
        profile = tiny_profile(
            doorbell=FixedCost(seconds=0.5, **cost),
            ready_flag=FixedCost(seconds=0.5, **cost),
            read_back=FixedCost(seconds=1.0, **cost),
            kernel_launch=FixedCost(seconds=0.125, **cost),
        )
        tiny = tiny_scene(make_trace([[[[1, 2], [3, 4]], [[1, 2], [3, 4]]]]), profile=profile)
        design = tiny_design(
            2, cache="none", slot_pages=None, transfer="cpu_zero_copy", transfer_threads=1, sync="flags"
        )
        priced = tiny.priced(tiny.plan(design))
        for unfold in (clock_timeline, simulated_timeline):
            timeline = unfold(priced, 0, "test")
            # norm launched by 0.125; norm, projection, append, score, select end at 2.125: the doorbell is seen at
            # 2.625, four pages are written until 6.625, the flag is seen at 7.125; attention and MLP take 5.5, and all
            # of it repeats 12.5 later (the first norm waited 0.125 for its launch)
            assert spans(timeline, Lane.POOL) == [
                ("doorbell", 0, 2.125, 2.625),
                ("bar_write", 0, 2.625, 6.625),
                ("doorbell", 1, 14.625, 15.125),
                ("bar_write", 1, 15.125, 19.125),
            ]
            flags = [span for span in spans(timeline, Lane.MAIN) if span[0] in ("ready_flag", "attention")]
            assert flags == [
                ("ready_flag", 0, 6.625, 7.125),
                ("attention", 0, 7.125, 9.125),
                ("ready_flag", 1, 19.125, 19.625),
                ("attention", 1, 19.625, 21.625),
            ]
            # MLP until 25.125; norm, head, sample until 26.625; read-back
            assert timeline.seconds == pytest.approx(27.625)
        # the launching thread never blocks before the end: twelve launches a layer and three are done by 3.375 s
        launches = [span for span in spans(timeline, Lane.LAUNCH) if span[0].startswith("launch ")]
        assert len(launches) == 27
        assert max(end for _, _, _, end in launches) == 3.375
