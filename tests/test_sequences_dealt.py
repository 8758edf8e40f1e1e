"""GPUs that share a model and attend for sequences of their own (`machine.attention_by = "sequences"`)."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from shared_models import free_and_paid, shared, with_all_reduce

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.plan import make_plan
from clo.schedule import Lane, record_step
from clo.schedule.work import Gemm
from clo.specs import Workload
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving import ServiceSettings, generate, serve, summarise_service, worker_costs
from clo_sim.serving.decode import DecodePrices
from clo_sim.serving.memory import MemoryRoom, memory_need, memory_room
from clo_sim.serving.prefill import prefill_prices

DESIGNS = sorted(presets.names("designs"))
MODEL = presets.load_model("llama-3-8b")


@cache
def whole_scene(batch: int = 8) -> Scene:
    return clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=16384, batch=batch)


def dealt(scene: Scene, gpus: int, profile: Any = None) -> Scene:
    """GPUs with sequences of their own."""
    one = shared(scene, gpus, profile)
    return replace(one, machine=one.machine.with_fields(attention_by="sequences"))


class TestParts:
    @given(st.sampled_from(["llama-3-8b", "qwen3-30b-a3b", "deepseek-v3"]), st.sampled_from([2, 4, 8]))
    def test_attention_is_whole_on_every_gpu_and_all_else_is_shared(self, name: str, gpus: int) -> None:
        model = presets.load_model(name)
        part = model.shard(gpus, whole_attention=True)
        assert part.attention_weight_values(0) == model.attention_weight_values(0)
        assert part.kv_bytes_per_token == model.kv_bytes_per_token
        router = 0 if model.experts is None else model.num_expert_layers * model.hidden_size * model.experts.num_experts
        attention = model.num_layers * model.attention_weight_values(0)
        alike = attention + router
        whole, parts = (one.with_fields(weight_bytes_per_value=2.0).weight_bytes / 2 for one in (model, part))
        assert gpus * parts - whole == pytest.approx((gpus - 1) * alike)

    def test_where_weights_do_not_fit_the_refusal_says_which_are_whole(self) -> None:
        scene = clo_sim.make_scene("llama-3-70b", "l40s", context_tokens=8192, batch=4)
        assert make_plan(scene.model, shared(scene, 4).machine, presets.load_design("clo"), scene.workload)
        problem = r"does not fit 4 GPUs, with attention's weights whole on each \(machine.attention_by = heads shares"
        with pytest.raises(SpecError, match=problem):
            make_plan(scene.model, dealt(scene, 4).machine, presets.load_design("clo"), scene.workload)

    def test_heads_need_not_divide(self) -> None:
        assert MODEL.shard(3, whole_attention=True).num_kv_heads == 8

    @pytest.mark.parametrize(("batch", "each"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
    @pytest.mark.parametrize("name", ["resident", "streamed", "clo"])
    def test_a_gpu_keeps_what_it_would_of_its_sequences_alone(self, name: str, batch: int, each: int) -> None:
        changes = {} if name != "clo" else {"slot_budgets": 2.0}
        design = presets.load_design(name).with_fields(**changes)
        machine = dealt(whole_scene(), 4).machine
        plan = make_plan(MODEL, machine, design, Workload(context_tokens=8192, batch=batch))
        alone = make_plan(MODEL, whole_scene().machine, design, Workload(context_tokens=8192, batch=each))
        assert plan.sequences == each
        assert plan.memory.kv == alone.memory.kv
        assert plan.host_bytes == alone.host_bytes
        assert plan.offloaded_heads == alone.offloaded_heads

    def test_one_gpu_has_nothing_to_deal_out(self) -> None:
        scene = whole_scene()
        alone = replace(scene, machine=scene.machine.with_fields(attention_by="sequences"))
        assert not alone.machine.deals_sequences
        assert simulate(alone, "clo", executor="clock").tpot_s == simulate(scene, "clo", executor="clock").tpot_s

    def test_only_heads_and_sequences_can_be_dealt_out(self) -> None:
        with pytest.raises(SpecError, match=r"machine.attention_by = 'layers'"):
            whole_scene().machine.with_fields(attention_by="layers")


class TestStep:
    @staticmethod
    def works(scene: Scene, name: str, layer: int) -> dict[str, Any]:
        nodes = record_step(scene.plan(presets.load_design(name))).nodes
        return {node.op.name: node.op.work for node in nodes if node.lane is Lane.MAIN and node.op.layer == layer}

    @pytest.mark.parametrize("name", ["resident", "resident-sparse", "streamed"])
    def test_attention_is_of_a_gpus_sequences_and_the_rest_of_the_batch(self, name: str) -> None:
        found = self.works(dealt(whole_scene(8), 4), name, 3)
        alone = self.works(whole_scene(2), name, 3)
        heads = self.works(shared(whole_scene(8), 4), name, 3)
        assert found.keys() == heads.keys()
        for op, work in found.items():
            expected = alone[op] if op in alone and op not in ("gate_up_proj", "activation", "down_proj") else heads[op]
            assert work == expected, op
        assert found["qkv_proj"] == Gemm(2, 6144, 4096)
        assert found["gate_up_proj"] == Gemm(8, 28672 // 4, 4096)

    @pytest.mark.parametrize("name", DESIGNS)
    def test_hidden_states_are_collected_before_what_is_shared(self, name: str) -> None:
        plan = dealt(whole_scene(), 4).plan(presets.load_design(name))
        names = [node.op.name for node in record_step(plan).nodes if node.lane is Lane.MAIN]
        before = [one for one, after in pairwise(names) if after == "all_reduce"]
        assert names[0] == "all_reduce"
        assert before == ["post_norm", "down_proj"] * MODEL.num_layers + ["final_norm", "sample"]

    @pytest.mark.parametrize("name", DESIGNS)
    def test_a_gpu_moves_what_it_would_of_its_sequences_alone(self, name: str) -> None:
        design = presets.load_design(name)
        together = simulate(dealt(whole_scene(8), 4), design, executor="clock")
        alone = simulate(replace(whole_scene(2), model=MODEL.shard(4, whole_attention=True)), design, executor="clock")
        assert together.h2d_bytes_per_step == alone.h2d_bytes_per_step
        assert together.memory == alone.memory
        assert together.hit_rate == alone.hit_rate
        assert together.tokens_per_s == pytest.approx(8 / together.tpot_s)

    @given(st.floats(1e-6, 1e-3), st.sampled_from([2, 4, 8]))
    def test_without_transfers_a_step_is_longer_by_its_all_reduces(self, seconds: float, gpus: int) -> None:
        count = 2 * MODEL.num_layers + 3
        free, paid = free_and_paid(dealt(whole_scene(), gpus), seconds)
        assert paid.tpot_s - free.tpot_s == pytest.approx(count * seconds, rel=1e-6)

    def test_the_roofline_counts_a_gpus_part(self) -> None:
        roof = simulate(dealt(whole_scene(8), 4), "resident", executor="clock").roofline
        part = MODEL.shard(4, whole_attention=True)
        assert roof.hbm_bytes == pytest.approx(part.step_weight_bytes(8) + 2 * 16384 * MODEL.kv_bytes_per_token)
        before = 32 * part.attention_weight_values(0)
        others = part.token_weight_values - before
        attention = 32 * 16384 * 32 * 4 * 128
        assert roof.compute_s == pytest.approx((2 * 8 * others + 2 * (2 * before + attention)) / 989e12)

    def test_results_say_how_many_sequences_each_attends_for(self) -> None:
        notes = simulate(dealt(whole_scene(9), 4), "clo", executor="clock").assumptions
        assert any(note.startswith("each GPU attends for 3 sequences") for note in notes)


class TestServices:
    LOAD = generate("poisson", rate_per_s=2, num_requests=40, lengths=[(2000, 20)])

    @pytest.mark.parametrize("name", ["resident", "clo"])
    def test_a_gpu_needs_a_share_of_every_sequence_but_must_hold_one_whole(self, name: str) -> None:
        design, scene = presets.load_design(name), dealt(whole_scene(), 4)
        one = replace(scene, model=MODEL.shard(4, whole_attention=True), machine=whole_scene().machine)
        assert memory_room(scene) == memory_room(one)
        need, alone = (memory_need(each, design) for each in (scene, one))
        for tokens in (1, 2000, 131072):
            assert 4 * need.device(tokens) == pytest.approx(alone.device(tokens), rel=1e-3, abs=4 * tokens + 4)
            assert 4 * need.host(tokens) == pytest.approx(alone.host(tokens), rel=1e-3, abs=4 * tokens)
        whole = 4 * need.device(2000)
        assert need.fits(2000, MemoryRoom(device=whole, host=10**12)) == (True, True)
        assert need.fits(2000, MemoryRoom(device=whole - 1, host=10**12)) == (False, True)

    def test_a_chunk_is_dealt_out(self) -> None:
        design = presets.load_design("clo")
        scene = dealt(whole_scene(), 4, with_all_reduce(whole_scene().profile, 1e-30))
        prices = prefill_prices(scene, design, chunk_tokens=512, block_tokens=512)
        alone = prefill_prices(whole_scene(), design, chunk_tokens=512, block_tokens=512)
        for field in ("pair_ns", "in_ns", "out_ns", "cached_in_ns"):
            assert getattr(prices, field) == pytest.approx(getattr(alone, field) / 4)
        part = replace(scene, model=MODEL.shard(4, whole_attention=True), machine=whole_scene().machine)
        gemms = prefill_prices(part, design, chunk_tokens=512, block_tokens=512)
        assert prices.dense_ns[512] < gemms.dense_ns[512]

    @pytest.mark.parametrize("batch", [3, 6, 9, 12])
    @pytest.mark.parametrize("name", ["resident", "clo"])
    def test_steps_between_priced_batches_take_what_the_fullest_gpu_does(self, name: str, batch: int) -> None:
        prices = DecodePrices(dealt(whole_scene(), 8), presets.load_design(name), max_context=65536)
        joined = prices.clock(batch).total(30000, 1) / 1e9
        assert joined == pytest.approx(prices.seconds(batch, 30000), rel=0.02)

    def test_contexts_are_priced_up_to_what_one_gpu_holds(self) -> None:
        scene = replace(dealt(whole_scene(), 8), kv_memory_bytes=4e9)
        prices = DecodePrices(scene, presets.load_design("resident"), max_context=131072)
        longest = {batch: max(prices._nodes(batch)) for batch in (1, 8, 16)}
        per_token = MODEL.kv_bytes_per_token
        assert longest[1] == longest[8] == pytest.approx(4e9 / per_token, rel=0.01)
        assert longest[16] == pytest.approx(2e9 / per_token, rel=0.01)

    def test_reports_say_that_memory_is_a_mean(self) -> None:
        load = ["--load", "fixed:1", "--input-tokens", "4096", "--output-tokens", "8", "--num-requests", "2"]
        dealt = ["--set", "machine.tensor_parallel=4", "--set", "machine.attention_by=sequences"]
        said = "on a GPU, in the mean of 4 with sequences of their own,"
        command = ["serve-sim", "--design", "resident", *load]
        assert said in " ".join(run(*command, *dealt).split())
        assert "in the mean of" not in run(*command, *dealt[:2])

    def test_a_service_runs(self) -> None:
        scene = dealt(whole_scene(), 4)
        costs = worker_costs(scene, presets.load_design("clo"), self.LOAD)
        result = summarise_service(serve(self.LOAD, costs, ServiceSettings(gpus=4)))
        assert result.replica_gpus == 4
        assert np.isfinite(result.completed_per_s)
