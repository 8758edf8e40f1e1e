"""Clock and simulator against mathematics: bounds, sums, limits, monotonicity, and timelines worked out by hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_trace, random_trace, tiny_design, tiny_machine, tiny_profile, tiny_scene

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.profile import FixedCost, InterferenceCost
from clo.schedule import Lane
from clo.specs import Design, LinkSpec
from clo.timeline import Timeline
from clo_sim.clock import run_clock, step_seconds
from clo_sim.contention import Contention
from clo_sim.priced import PricedStep
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy
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
    return Contention(priced.pricer.profile.interference, share_links=False, interfere=False)


def designs() -> st.SearchStrategy[Design]:
    """Valid combinations of every choice that decides the order of a step."""

    def build(choices: dict[str, Any]) -> Design | None:
        try:
            return tiny_design(4, **choices)
        except SpecError:
            return None
        except ValueError:
            return None

    fields = st.fixed_dictionaries(
        {
            "cache": st.sampled_from(["none", "lru", "head_reuse"]),
            "on_miss": st.sampled_from(["diff", "replace"]),
            "prefetch_depth": st.sampled_from([0, 1]),
            "prefetch_query": st.sampled_from(["layer_ahead", "previous_step"]),
            "transfer": st.sampled_from(TRANSFERS),
            "sync": st.sampled_from(SYNCS),
            "resolve_on": st.sampled_from(["gpu", "cpu"]),
            "dense_layers": st.sampled_from([0, 1]),
            "pinned_head_fraction": st.sampled_from([0.0, 0.5]),
            "slot_pages": st.sampled_from([4, 7]),
        }
    )
    return fields.map(build).filter(lambda design: design is not None)


def costly_profile(draw: Any = None) -> Any:
    """Costs that make every kind of wait matter in the tiny world."""
    cost = {"source": "assumed"}
    return tiny_profile(
        **{name: FixedCost(seconds=0.125, **cost) for name in ("kernel_launch", "graph_launch", "thread_wake")},
        **{name: FixedCost(seconds=0.5, **cost) for name in ("stream_sync", "read_back", "doorbell", "ready_flag")},
        interference=InterferenceCost(per_sm_share=0.5, dma=0.25, **cost),
    )


def tiny_priced(design: Design, seed: int = 0) -> PricedStep:
    trace = random_trace(seed)
    tiny = tiny_scene(trace, profile=costly_profile())
    return tiny.priced(tiny.plan(design))


def lane_sums(priced: PricedStep) -> dict[Lane, Any]:
    sums: dict[Lane, Any] = defaultdict(lambda: np.zeros(priced.num_steps))
    for segment, seconds in zip(priced.segments, priced.durations, strict=True):
        sums[segment.lane] = sums[segment.lane] + seconds
    return sums


class TestOneStep:
    """What holds for any design, any order, any cost."""

    @given(designs(), st.integers(0, 20))
    @settings(max_examples=120, deadline=None)
    def test_longest_lane_and_sum_of_all_bound_a_step(self, design: Design, seed: int) -> None:
        priced = tiny_priced(design, seed)
        sums = lane_sums(priced)
        longest, everything = np.max(list(sums.values()), axis=0), np.sum(list(sums.values()), axis=0)
        for seconds in (run_clock(priced).seconds, run_simpy(priced).seconds):
            assert np.all(seconds >= longest * (1 - 1e-12))
            assert np.all(seconds <= everything * (1 + 1e-12))

    @given(designs(), st.integers(0, 20))
    @settings(max_examples=120, deadline=None)
    def test_clock_and_simulator_agree_where_nothing_contends(self, design: Design, seed: int) -> None:
        priced = tiny_priced(design, seed)
        clock, simulated = run_clock(priced), run_simpy(priced, contention=without_contention(priced))
        np.testing.assert_array_equal(simulated.seconds, clock.seconds)
        np.testing.assert_array_equal(step_seconds(priced), clock.seconds)
        for cause, gaps in clock.gaps.items():
            np.testing.assert_allclose(simulated.gaps[cause], gaps, rtol=1e-12, atol=1e-12, err_msg=cause)

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
        number = data.draw(st.integers(0, len(priced.segments) - 1))
        shorter = priced.durations.copy()
        shorter[number] *= data.draw(st.floats(0, 1))
        priced.__dict__["durations"] = shorter
        assert np.all(step_seconds(priced) <= before * (1 + 1e-12))


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
        fetched = sum(timeline.num_bytes(op) for op in ("gather_pages", "copy_pages", "copy_staged", "bar_write"))
        assert fetched == pytest.approx(priced.traffic.fetched_pages[step].sum() * plan.page_bytes, rel=1e-12)
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


def timeline_of(priced: PricedStep, step: int, executor: str) -> Timeline:
    unfold = clock_timeline if executor == "clock" else simulated_timeline
    return unfold(priced, step, "test")


class TestLimits:
    """Where only one thing costs anything, the answer is known."""

    @given(designs())
    @settings(max_examples=60, deadline=None)
    def test_an_infinite_link_leaves_the_compute_bound_time(self, design: Design) -> None:
        # what is left then is the main stream: no CPU has a part in it, nothing is launched ahead
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
