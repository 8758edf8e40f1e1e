"""Prices and timelines worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from executor_oracles import (
    spans,
)
from tiny import make_trace, tiny_design, tiny_machine, tiny_profile, tiny_scene

from clo.pricing import Pricer
from clo.profile import (
    BookkeepingCost,
    CopyCost,
    FixedCost,
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
from clo_sim.clock import run_clock
from clo_sim.priced import PricedStep
from clo_sim.run import simulate
from clo_sim.simulator import run_simpy
from clo_sim.unfold import clock_timeline, simulated_timeline


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
