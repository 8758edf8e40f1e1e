"""GPUs that share a model: each does its part, and all-reduces are what sharing costs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_models import free_and_paid, shared, with_all_reduce
from tiny import NO_TRAFFIC, random_trace, tiny_design, tiny_model, tiny_scene

import clo_sim
from clo import presets
from clo.errors import SpecError, TraceError
from clo.plan import kv_room, make_plan
from clo.pricing import Pricer, hbm_bytes, link_bytes
from clo.schedule import Lane, record_step
from clo.schedule.work import AllReduce
from clo.specs import Design, Sync, Workload
from clo.trace import AttentionTrace
from clo_sim.evaluation import evaluate
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving import (
    ServiceSettings,
    generate,
    parse_slo,
    serve,
    summarise_service,
    worker_costs,
)
from clo_sim.serving.memory import memory_room
from clo_sim.serving.plan import smallest_fleet
from clo_sim.stand_in import TrafficSource
from clo_sim.variation import Task
from clo_sim.worth import worth_of_choices

DESIGNS = sorted(presets.names("designs"))
MODEL = presets.load_model("llama-3-8b")
LAUNCH_S = presets.load_named_profile("h200").kernel_launch.seconds


@cache
def whole_scene(context_tokens: int = 16384, batch: int = 4) -> Scene:
    return clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=context_tokens, batch=batch)


class TestParts:
    @given(st.sampled_from(["llama-3-8b", "llama-3-70b", "qwen2.5-14b"]), st.sampled_from([2, 4, 8]))
    def test_parts_add_up_to_the_model(self, name: str, gpus: int) -> None:
        model = presets.load_model(name)
        part = model.shard(gpus)
        for field in ("weight_bytes", "token_weight_values", "kv_bytes_per_token"):
            assert gpus * getattr(part, field) == pytest.approx(getattr(model, field), rel=1e-12)
        assert (part.hidden_size, part.group_size) == (model.hidden_size, model.group_size)

    def test_one_gpu_has_all_of_it(self) -> None:
        assert MODEL.shard(1) is MODEL

    def test_what_does_not_divide_is_rounded_up(self) -> None:
        part = MODEL.with_fields(intermediate_size=1001, vocab_size=33).shard(4)
        assert (part.intermediate_size, part.vocab_size) == (251, 9)

    @pytest.mark.parametrize(("gpus", "copies"), [(2, 1), (4, 1), (8, 2)])
    def test_more_gpus_than_kv_heads_keep_some_alike(self, gpus: int, copies: int) -> None:
        model = presets.load_model("qwen3-30b-a3b")
        part = model.shard(gpus)
        assert (part.num_kv_heads, part.num_query_heads) == (4 * copies // gpus, 32 // gpus)
        assert part.kv_bytes_per_token == copies * model.kv_bytes_per_token / gpus
        machine = presets.load_machine("h200").with_fields(tensor_parallel=gpus)
        scene = clo_sim.make_scene(model, machine, context_tokens=32768, batch=4)
        plan = scene.plan(presets.load_design("clo"))
        assert (plan.kv_heads_of_all, plan.query_heads_of_all, plan.kv_copies) == (4, 32, copies)
        assert plan.host_bytes == 46 * 4 * 32768 * part.layer_token_bytes
        notes = simulate(scene, "clo", executor="clock").assumptions
        said = f"each KV head is kept, and its pages are fetched, by {copies} GPUs: they are more than heads"
        assert (said in notes) == (copies > 1)

    def test_sequences_that_are_dealt_out_keep_heads_once(self) -> None:
        model, machine = presets.load_model("qwen3.5-27b"), presets.load_machine("h200")
        dealt = machine.with_fields(tensor_parallel=8, attention_by="sequences")
        plan = clo_sim.make_scene(model, dealt, context_tokens=32768, batch=8).plan(presets.load_design("clo"))
        assert (plan.kv_copies, plan.kv_heads_of_all, plan.query_heads_of_all) == (1, 4, 24)

    def test_heads_that_cannot_be_dealt_out_are_named(self) -> None:
        with pytest.raises(SpecError, match=r"tensor_parallel = 3: the 8 KV heads of llama-3-8b cannot be dealt out"):
            MODEL.shard(3)

    def test_a_gpu_has_room_for_what_its_part_leaves(self) -> None:
        machine = presets.load_machine("h200").with_fields(tensor_parallel=4)
        expected = machine.gpu.memory_bytes - machine.reserve_bytes - MODEL.weight_bytes / 4
        assert kv_room(MODEL, machine) == pytest.approx(expected)

    @pytest.mark.parametrize("name", ["resident", "streamed", "clo"])
    def test_gpus_hold_together_what_one_would(self, name: str) -> None:
        design, load = presets.load_design(name), Workload(context_tokens=32768, batch=2)
        changes = {} if name != "clo" else {"slot_budgets": 2.0}
        design = design.with_fields(**changes)
        one, four = (
            make_plan(MODEL, presets.load_machine("h200").with_fields(tensor_parallel=gpus), design, load)
            for gpus in (1, 4)
        )
        assert 4 * four.memory.kv == pytest.approx(one.memory.kv)
        assert 4 * four.host_bytes == pytest.approx(one.host_bytes)

    def test_a_model_too_large_says_what_to_change(self) -> None:
        large, machine = presets.load_model("llama-3-70b"), presets.load_machine("l40s")
        with pytest.raises(SpecError, match=r"does not fit one GPU: simulated, .* \(machine.tensor_parallel\)$"):
            kv_room(large, machine)
        with pytest.raises(
            SpecError, match=r"70\.6 GB on each .* does not fit 2 GPUs: .* \(machine.tensor_parallel\)$"
        ):
            kv_room(large, machine.with_fields(tensor_parallel=2))
        # of GB200 only 2 and 4 were: 8, which are refused, are not simply proposed
        with pytest.raises(SpecError, match="up to 8 may share it where all-reduces of so many were timed"):
            kv_room(presets.load_model("glm-5.2"), presets.load_machine("gb200").with_fields(tensor_parallel=4))

    @pytest.mark.parametrize(("name", "what"), [("resident", "device"), ("streamed", "pinned")])
    def test_what_does_not_fit_is_said_of_each_gpu(self, name: str, what: str) -> None:
        machine, load = presets.load_machine("l40s").with_fields(tensor_parallel=4), Workload(batch=128)
        with pytest.raises(SpecError, match=f"of {what} memory, each of 4 l40s has "):
            make_plan(MODEL, machine, presets.load_design(name).with_fields(prefetch_depth=0), load)

    def test_no_more_gpus_than_there_may_be_are_proposed(self) -> None:
        machine = presets.load_machine("l40s").with_fields(tensor_parallel=8, reserve_bytes=47e9)
        with pytest.raises(SpecError, match=r"does not fit 8 GPUs$"):
            kv_room(MODEL, machine)


class TestStep:
    @staticmethod
    def names(design: str, gpus: int) -> list[str]:
        plan = shared(whole_scene(), gpus).plan(presets.load_design(design))
        return [node.op.name for node in record_step(plan).nodes if node.lane is Lane.MAIN]

    @pytest.mark.parametrize("design", DESIGNS)
    def test_a_layer_is_added_up_after_attention_and_after_its_mlp(self, design: str) -> None:
        alone, together = self.names(design, 1), self.names(design, 4)
        assert "all_reduce" not in alone
        assert [name for name in together if name != "all_reduce"] == alone
        assert together[0] == "all_reduce"  # the embedding, of which each GPU has a part
        before = [one for one, after in pairwise(together) if after == "all_reduce"]
        assert before == ["out_proj", "down_proj"] * MODEL.num_layers + ["sample"]

    @pytest.mark.parametrize("name", DESIGNS)
    def test_where_adding_up_is_free_a_gpu_does_its_part_and_nothing_else(self, name: str) -> None:
        scene = whole_scene()
        free = with_all_reduce(scene.profile, 1e-30)
        design = presets.load_design(name)
        part = simulate(replace(scene, model=MODEL.shard(4)), design)
        together = simulate(shared(scene, 4, free), design)
        # outside a graph the launching thread launches more kernels, which may be seen
        longest = 1.0 if design.sync is Sync.GRAPH else 1.0 + (2 * MODEL.num_layers + 2) * LAUNCH_S / part.tpot_s
        assert part.tpot_s * (1 - 1e-6) <= together.tpot_s <= part.tpot_s * longest * (1 + 1e-6)
        assert together.h2d_bytes_per_step == part.h2d_bytes_per_step
        assert together.memory == part.memory

    @given(st.floats(1e-6, 1e-3), st.sampled_from([2, 4, 8]))
    def test_without_transfers_a_step_is_longer_by_its_all_reduces(self, seconds: float, gpus: int) -> None:
        count = 2 * MODEL.num_layers + 2
        free, paid = free_and_paid(shared(whole_scene(), gpus), seconds)
        assert paid.tpot_s - free.tpot_s == pytest.approx(count * seconds, rel=1e-6)
        assert paid.busy_s["all-reduce"] == pytest.approx(count * seconds)
        assert paid.ops["all_reduce"].calls == count

    def test_tokens_of_each_gpu_are_a_share_of_all(self) -> None:
        result = simulate(shared(whole_scene(), 4), "clo", executor="clock")
        assert result.gpu_tokens_per_s == pytest.approx(result.tokens_per_s / 4)
        found = evaluate(whole_scene(), Task(design=result.design, changes=(("machine.tensor_parallel", 4),)))
        assert found.metrics["gpu_tokens_per_s"] == pytest.approx(result.gpu_tokens_per_s)

    def test_results_name_the_gpus_and_say_that_one_stands_for_all(self) -> None:
        result = simulate(shared(whole_scene(), 4), "clo")
        assert result.machine == "4 x h200"
        assert any("tokens/s of all" in note for note in result.assumptions)
        assert any("the 4 GPUs do alike" in note for note in result.assumptions)
        assert simulate(whole_scene(), "clo").machine == "h200"

    @pytest.mark.parametrize(("gpus", "fraction", "note"), [(8, 0.125, "0 of 1"), (4, 0.375, "1 of 2"), (4, 0.5, "")])
    def test_pinned_heads_are_rounded_on_each_gpu_and_results_say_so(
        self, gpus: int, fraction: float, note: str
    ) -> None:
        design = presets.load_design("clo").with_fields(pinned_head_fraction=fraction)
        notes = simulate(shared(whole_scene(), gpus), design, executor="clock").assumptions
        said = [one for one in notes if one.startswith("pinned_head_fraction")]
        assert said == ([f"pinned_head_fraction = {fraction}: {note} KV heads on each GPU"] if note else [])

    def test_pinning_no_more_heads_is_not_said_to_change_the_answers(self) -> None:
        scene = shared(whole_scene(), 8)
        found = worth_of_choices(scene, simulate(scene, "clo"), {"pinned_head_fraction": (0.125, 0.75)})
        assert [one.note for one in found.alternatives] == [
            "pins as many heads, after rounding",
            "changes the answers: another share of the heads attends in full",
        ]


class TestPrices:
    def test_a_sum_takes_what_was_measured(self) -> None:
        profile, machine = presets.load_named_profile("h200"), presets.load_machine("h200")
        assert profile.all_reduce is not None
        price = Pricer(profile, machine).seconds(AllReduce(4, 16 * 8192), NO_TRAFFIC)
        assert price == profile.all_reduce.seconds(4, 16 * 8192)
        assert 3e-6 < price < 30e-6

    def test_every_gpu_reads_its_values_and_writes_the_sum(self) -> None:
        assert hbm_bytes(AllReduce(4, 1000), NO_TRAFFIC) == 4000
        assert link_bytes(AllReduce(4, 1000), NO_TRAFFIC) == 0

    def test_gpus_without_links_of_their_own_take_from_the_host_link(self) -> None:
        profile, machine = presets.load_named_profile("l40s"), presets.load_machine("l40s")
        work, seconds = AllReduce(4, 10**6), 1e-3
        demand = Pricer(profile, machine).demand(work, seconds, 0.0)
        # 2 (n - 1) / n of two bytes a value
        assert demand.h2d == pytest.approx(3e6 / seconds / machine.link.h2d_bytes_per_s)
        assert demand.d2h == pytest.approx(3e6 / seconds / machine.link.d2h_bytes_per_s)
        nvlink = Pricer(presets.load_named_profile("h200"), presets.load_machine("h200")).demand(work, seconds, 0.0)
        assert (nvlink.h2d, nvlink.d2h) == (0.0, 0.0)

    def test_on_another_gpu_it_is_assumed(self) -> None:
        result = simulate(
            clo_sim.make_scene(model="llama-3-8b", machine="a40", context_tokens=8192, batch=1), "resident"
        )
        assert "all_reduce" not in result.ops
        scene = shared(clo_sim.make_scene(model="llama-3-8b", machine="a40", context_tokens=8192, batch=1), 2)
        result = simulate(scene, "resident")
        assert result.ops["all_reduce"].source == "assumed"
        assert any("all-reduce takes as long as between NVIDIA A100" in note for note in result.assumptions)

    def test_a_profile_without_all_reduces_is_named(self) -> None:
        scene = whole_scene()
        without = scene.profile.model_copy(update={"all_reduce": None})
        with pytest.raises(SpecError, match="profile h200 has no times of an all-reduce"):
            simulate(shared(scene, 2, without), "clo")

    def test_more_gpus_than_were_timed_are_named(self) -> None:
        scene = clo_sim.make_scene("llama-3-8b", presets.load_machine("gb200").with_fields(tensor_parallel=8))
        with pytest.raises(SpecError, match=r"tensor_parallel = 8: all-reduces of profile gb200 .* up to 4 GPUs"):
            simulate(scene, "clo")

    def test_timed_machines_are_one_device(self) -> None:
        scene = clo_sim.make_scene(machine="calibration/profiles/machines/cpu-2core.json", context_tokens=1024, batch=1)
        with pytest.raises(SpecError, match="tensor_parallel = 3: the costs of cpu-2core were timed on one device"):
            shared(scene, 3)


class TestTraces:
    """A plan's model is one GPU's part; a trace is of a whole model."""

    @staticmethod
    def scene(trace: AttentionTrace, gpus: int, **fields: Any) -> Scene:
        return shared(tiny_scene(trace, **fields), gpus)

    def test_a_gpu_has_its_own_heads_of_its_models_trace(self) -> None:
        scene = self.scene(random_trace(0, heads=4), 2)
        source = TrafficSource(scene.source.trace, resample_heads=False)
        traffic = source.traffic(scene.plan(tiny_design(4, cache="lru")))
        whole = self.scene(scene.source.trace, 1)
        first = source.traffic(whole.plan(tiny_design(4, cache="lru")))
        assert 0 < traffic.fetched_pages.sum() < first.fetched_pages.sum()
        assert traffic.assumptions == ("the first 2 of 4 recorded KV heads stand for all GPUs",)

    def test_a_part_as_large_as_another_model_is_not_that_model(self) -> None:
        trace = random_trace(0, heads=2)
        model = tiny_model(num_layers=3, num_query_heads=4, num_kv_heads=4)
        plan = self.scene(trace, 2, model=model).plan(tiny_design(4))
        with pytest.raises(TraceError, match=r"3 layers x 2 KV heads, but tiny has 3 x 4"):
            TrafficSource(trace, resample_heads=False).traffic(plan)
        assert "recorded KV heads" in TrafficSource(trace).traffic(plan).assumptions[0]


class TestServices:
    LOAD = generate("poisson", rate_per_s=2, num_requests=60, lengths=[(2000, 20)])

    def test_prompts_are_added_up_too(self) -> None:
        scene, design = whole_scene(), presets.load_design("clo")
        free, paid = (
            worker_costs(shared(scene, 4, with_all_reduce(scene.profile, each)), design, self.LOAD).prefill.dense_ns
            for each in (1e-30, 1e-5)
        )
        longer = np.diff([free, paid], axis=0)[0][1:]
        assert longer == pytest.approx((2 * MODEL.num_layers + 1) * 10_000, abs=1)

    def test_the_first_token_is_agreed_on(self) -> None:
        scene, design = whole_scene(), presets.load_design("clo")
        free, paid = (
            worker_costs(shared(scene, 4, with_all_reduce(scene.profile, each)), design, self.LOAD).prefill.head_ns
            for each in (1e-30, 1e-5)
        )
        assert paid - free == pytest.approx(10_000, abs=1)

    def test_all_reduces_of_another_gpu_are_not_measured_ones(self) -> None:
        scene, design = shared(whole_scene(), 4), presets.load_design("clo")
        profile = scene.profile.model_copy(update={"all_reduce": presets.load_named_profile("a100").all_reduce})
        for costs, measured in ((scene.profile, True), (profile, False)):
            prices = worker_costs(replace(scene, profile=costs), design, self.LOAD).decode_prices
            assert prices is not None
            assert prices.kernels_measured == measured

    def test_gpus_are_counted_all(self) -> None:
        costs = worker_costs(shared(whole_scene(), 4), presets.load_design("clo"), self.LOAD)
        run = serve(self.LOAD, costs, ServiceSettings(gpus=8))
        result = summarise_service(run)
        assert len(run.replicas) == 2
        assert (result.gpus, result.replica_gpus) == (8, 4)
        with pytest.raises(SpecError, match=r"gpus = 6: a replica takes 4 \(machine.tensor_parallel\)"):
            serve(self.LOAD, costs, ServiceSettings(gpus=6))

    def test_a_fleet_is_so_many_replicas(self) -> None:
        scene, design, slo = shared(whole_scene(), 4), presets.load_design("clo"), parse_slo("ttft_p95<1s")
        busy = generate("fixed", rate_per_s=60, num_requests=400, lengths=[(2000, 20)])
        fleet = smallest_fleet(scene, design, busy, slo, ServiceSettings())
        costs = worker_costs(scene, design, busy)
        assert fleet.gpus is not None
        assert fleet.gpus > 4
        assert fleet.gpus % 4 == 0
        met = {}
        for gpus in (fleet.gpus - 4, fleet.gpus):
            met[gpus] = summarise_service(serve(busy, costs, ServiceSettings(gpus=gpus)), slo=slo).met()
        assert met == {fleet.gpus - 4: False, fleet.gpus: True}
        assert smallest_fleet(scene, design, busy, slo, ServiceSettings(), near=4 * 32) == fleet

    def test_a_replica_that_may_not_be_tried_is_said_to_be_that(self) -> None:
        scene, slo = shared(whole_scene(), 4), parse_slo("ttft_p95<1s")
        fleet = smallest_fleet(scene, presets.load_design("clo"), self.LOAD, slo, ServiceSettings(), max_gpus=3)
        assert fleet.gpus is None
        assert fleet.problem == "a replica takes 4 GPUs, 3 may be tried"

    def test_an_slo_that_is_lost_even_alone_names_all_gpus_of_a_replica(self) -> None:
        scene, slo = shared(whole_scene(), 4), parse_slo("ttft_p95<1ms")
        fleet = smallest_fleet(scene, presets.load_design("clo"), self.LOAD, slo, ServiceSettings())
        assert fleet.problem.endswith("even for requests alone on 4 idle GPUs")

    def test_memory_is_a_gpus(self) -> None:
        scene = whole_scene()
        more = memory_room(shared(scene, 4)).device - memory_room(scene).device
        assert more == pytest.approx(MODEL.weight_bytes * 3 / 4, abs=2)


def test_the_gpus_are_varied_as_any_other_field() -> None:
    task = Task(design=Design(name="x"), changes=(("machine.tensor_parallel", 2),))
    found = evaluate(whole_scene(), task)
    assert found.problem == ""
    assert found.tpot_s is not None
