"""Hybrid models, in which some layers have linear attention: shape, plan, step, memory, prefill, kept prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model
from toy_service import trace_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.placement import hosted_block_bytes, hosted_token_bytes
from clo.plan import make_plan
from clo.schedule import record_step
from clo.schedule.work import DecodeAttention, Gemm, StreamKernel
from clo.specs import LinearSpec, ModelSpec, Workload
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving import ServiceSettings, serve, worker_costs
from clo_sim.serving.memory import memory_need, smallest_plan
from clo_sim.serving.prefill import prefill_prices
from clo_sim.serving.prefill_attention import pairs_of

DESIGNS = sorted(presets.names("designs"))
QWENS = [name for name in presets.names("models") if name.startswith(("qwen3.5", "qwen3-next"))]
LLAMA, QWEN = presets.load_model("llama-3-8b"), presets.load_model("qwen3.5-27b")
LINEAR = {"num_key_heads": 2, "num_value_heads": 6, "key_dim": 3, "value_dim": 5}


def tiny_hybrid(places: tuple[int, ...] = (0,), **changes: Any) -> ModelSpec:
    return tiny_model(linear=LINEAR | {"layers": places}, **changes)


def scene_of(model: ModelSpec = QWEN, context_tokens: int = 32768, batch: int = 4, **fields: Any) -> Scene:
    machine = presets.load_machine("h200").with_fields(**fields)
    return clo_sim.make_scene(model, machine, context_tokens=context_tokens, batch=batch)


class TestShape:
    def test_by_hand(self) -> None:
        linear = LinearSpec(layers=(0, 1, 2), **LINEAR)
        assert (linear.value_width, linear.conv_width) == (30, 12 + 30)
        # six states of 3 x 5 in float32, and three tokens of queries, keys and values in bf16
        assert linear.state_bytes == 6 * 15 * 4 + 3 * 42 * 2
        # in and out; the token's queries, keys and values, what they become, and the output
        assert linear.step_bytes == 2 * linear.state_bytes + 2 * (42 + 42 + 30)
        half = linear.with_fields(conv_tokens=1, state_bytes_per_value=2.0)
        assert half.state_bytes == 6 * 15 * 2

    def test_layers_differ_in_their_weights(self) -> None:
        model = tiny_hybrid(gated_attention=True)
        # queries, keys, values and gate; decay and step of each value head; out
        assert model.attention_weight_values(0) == 4 * (42 + 30) + 4 * 12 + 4 * 30
        # queries twice, keys, values; out
        assert model.attention_weight_values(1) == 4 * (2 * 4 + 4 + 4) + 4 * 4
        others = tiny_model().weight_bytes / 2 - 2 * tiny_model().attention_weight_values(0)
        around = model.attention_weight_values(0) + model.attention_weight_values(1)
        assert model.weight_bytes / 2 == others + around == others + model.all_attention_weight_values

    @pytest.mark.parametrize(
        ("name", "weights", "used"),
        # as they are called: weights, and those that a token passes
        [
            ("qwen3.5-27b", 27e9, 27e9),
            ("qwen3.5-35b-a3b", 35e9, 3e9),
            ("qwen3.5-122b-a10b", 122e9, 10e9),
            ("qwen3.5-397b-a17b", 397e9, 17e9),
            ("qwen3-next-80b-a3b", 80e9, 3.6e9),
        ],
    )
    def test_models_are_as_large_as_their_makers_say(self, name: str, weights: float, used: float) -> None:
        model = presets.load_model(name)
        assert model.weight_bytes / 2 == pytest.approx(weights, rel=0.01)
        assert model.token_weight_values == pytest.approx(used, rel=0.11)

    @pytest.mark.parametrize("name", QWENS)
    def test_every_fourth_layer_has_keys_and_values(self, name: str) -> None:
        model = presets.load_model(name)
        assert model.linear is not None
        with_kv = [layer for layer in range(model.num_layers) if model.linear_in(layer) is None]
        assert with_kv == list(range(3, model.num_layers, 4))
        assert model.kv_bytes_per_token == len(with_kv) * model.num_kv_heads * 2 * 256 * 2

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"layers": (2,)}, "linear.layers: 2 must be less than num_layers = 2"),
            ({"layers": (0, 1)}, "linear.layers must leave a layer with keys and values"),
            ({"layers": ()}, "must name at least one layer"),
            ({"layers": (1, 0)}, "must name at least one layer, and ascend"),
            ({"num_value_heads": 3}, "num_value_heads = 3 must be a multiple of num_key_heads = 2"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            tiny_model().with_fields(linear=LINEAR | {"layers": (0,)} | fields)

    def test_windows_beside_linear_attention_are_refused(self) -> None:
        with pytest.raises(SpecError, match="windowed_layers and linear exclude each other"):
            tiny_model().with_fields(linear=LINEAR | {"layers": (0,)}, window_tokens=4, windowed_layers=(0,))

    def test_gpus_share_the_heads_and_each_state(self) -> None:
        half = QWEN.shard(2)
        assert half.linear is not None
        assert (half.linear.num_key_heads, half.linear.num_value_heads) == (8, 24)
        assert half.state_bytes == QWEN.state_bytes / 2
        assert QWEN.shard(8, whole_attention=True).state_bytes == QWEN.state_bytes
        with pytest.raises(SpecError, match=r"the 2 linear attention's key heads of tiny cannot be dealt out evenly"):
            tiny_hybrid(num_query_heads=4, num_kv_heads=4).shard(4)


class TestAnyDesign:
    def test_what_was_not_timed_is_said(self) -> None:
        for changes, notes in (({}, 0), ({"key_dim": 64}, 1), ({"state_bytes_per_value": 2.0}, 1)):
            model = QWEN.with_fields(linear=QWEN.linear.model_dump() | changes)  # type: ignore[union-attr]
            said = simulate(scene_of(model), "resident", executor="clock").assumptions
            assert sum(note.startswith("linear attention was timed") for note in said) == notes

    @pytest.mark.parametrize("name", DESIGNS)
    def test_every_design_runs_a_real_model_of_this_kind(self, name: str) -> None:
        scene = scene_of(presets.load_model("qwen3.5-35b-a3b"))
        clock, simpy = (simulate(scene, name, executor=executor) for executor in ("clock", "simpy"))  # type: ignore[arg-type]
        assert 0 < clock.tpot_s <= simpy.tpot_s * (1 + 1e-9)

    @pytest.mark.parametrize("name", ["qwen3.5-27b", "gemma-3-27b"])
    def test_layers_that_are_never_offloaded_make_no_others_dense(self, name: str) -> None:
        scene = scene_of(presets.load_model(name))
        none, two = (scene.plan(presets.load_design("clo").with_fields(dense_layers=count)) for count in (0, 2))
        assert none.sparse_layers == two.sparse_layers
        found, wanted = (scene.source.traffic(plan).fetched_pages for plan in (none, two))
        np.testing.assert_array_equal(found, wanted)


class TestStep:
    def test_the_operations_of_both_kinds_of_layers(self) -> None:
        nodes = record_step(scene_of().plan(presets.load_design("resident"))).nodes
        names: dict[int, list[str]] = {0: [], 3: []}
        for node in nodes:
            if node.op.layer in names and not isinstance(node.op.work, DecodeAttention):
                names[node.op.layer].append(node.op.name)
        mlp = ["post_norm", "gate_up_proj", "activation", "down_proj"]
        behind = ["output_gate", "out_proj", *mlp]
        assert [name for name in names[0] if "launch" not in name] == [
            *["input_norm", "linear_proj", "decay_proj", "linear_attention"],
            *behind,
        ]
        assert [name for name in names[3] if "launch" not in name] == ["input_norm", "qkv_proj", "append_kv", *behind]

    def test_their_sizes(self) -> None:
        work = {
            (node.op.layer, node.op.name): node.op.work
            for node in record_step(scene_of().plan(presets.load_design("resident"))).nodes
        }
        assert QWEN.linear is not None
        assert work[0, "linear_proj"] == Gemm(4, 2 * 16 * 128 + 2 * 48 * 128, 5120)
        assert work[0, "decay_proj"] == Gemm(4, 2 * 48, 5120)
        assert work[0, "linear_attention"] == StreamKernel("linear_attention", 4 * QWEN.linear.step_bytes)
        assert work[0, "output_gate"] == StreamKernel("elementwise", 3 * 4 * 48 * 128 * 2.0)
        assert work[0, "out_proj"] == Gemm(4, 5120, 48 * 128)
        assert work[3, "qkv_proj"] == Gemm(4, (2 * 24 + 2 * 4) * 256, 5120)
        assert work[3, "output_gate"] == StreamKernel("elementwise", 3 * 4 * 24 * 256 * 2.0)
        assert work[3, "out_proj"] == Gemm(4, 5120, 24 * 256)

    def test_a_linear_layer_predicts_the_queries_of_the_next_one(self) -> None:
        design = presets.load_design("clo").with_fields(prefetch_depth=1)
        widths = {
            node.op.layer: node.op.work.n
            for node in record_step(scene_of().plan(design)).nodes
            if node.op.name == "linear_proj" and isinstance(node.op.work, Gemm)
        }
        alone = 2 * 16 * 128 + 2 * 48 * 128
        # queries only: nobody needs a gate that is computed ahead; the first layers are dense, but linear ones are not
        assert {layer: width - alone for layer, width in widths.items()} == {
            layer: 24 * 256 if layer % 4 == 2 else 0 for layer in range(64) if layer % 4 != 3
        }

    def test_what_is_selected_and_fetched_is_of_the_others(self) -> None:
        for name in ("clo", "streamed", "staged", "recall"):
            nodes = record_step(scene_of().plan(presets.load_design(name))).nodes
            moved = {node.op.layer for node in nodes if node.op.part in ("selection", "transfer")}
            assert moved == set(range(3, 64, 4))

    def test_the_roofline_reads_and_writes_states(self) -> None:
        scene = scene_of()
        roof = simulate(scene, "resident", executor="clock").roofline
        moved = 4 * (32768 * QWEN.kv_bytes_per_token + 2 * QWEN.state_bytes)
        assert roof.hbm_bytes == pytest.approx(QWEN.step_weight_bytes(4) + moved)
        attention = 16 * 24 * 32768 * 4 * 256 + 48 * 6 * 48 * 128 * 128
        flops = 4 * (2 * QWEN.token_weight_values + attention)
        assert roof.compute_s == pytest.approx(flops / scene.machine.gpu.peak_flops_per_s)

    def test_time_does_not_grow_with_the_context_where_it_should_not(self) -> None:
        short, long = (
            simulate(scene_of(context_tokens=tokens), "resident", executor="clock") for tokens in (4096, 65536)
        )
        assert short.ops["linear_attention"].seconds == long.ops["linear_attention"].seconds
        assert short.ops["attention"].seconds < long.ops["attention"].seconds


class TestMemory:
    def test_by_hand(self) -> None:
        machine, load = presets.load_machine("h200"), Workload(context_tokens=16384, batch=2)
        layer = 2 * 16384 * 4 * 2 * 256 * 2
        plan = make_plan(QWEN, machine, presets.load_design("resident"), load)
        assert plan.memory.dense_layers == 16 * layer
        assert plan.memory.states == 2 * QWEN.state_bytes == 2 * 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)
        assert plan.memory.kv == 16 * layer + 2 * QWEN.state_bytes
        plan = make_plan(QWEN, machine, presets.load_design("clo").with_fields(slot_budgets=1.0), load)
        # the first two layers, which designs keep dense, are linear anyway
        assert plan.sparse_layers == tuple(range(3, 64, 4))
        assert plan.memory.dense_layers == 0
        assert plan.memory.states == 2 * QWEN.state_bytes
        assert plan.host_bytes == 16 * layer

    @pytest.mark.parametrize("name", ["resident", "clo", "streamed"])
    def test_a_service_never_counts_less_than_a_sequence_needs(self, name: str) -> None:
        scene, design = scene_of(), presets.load_design(name)
        need = memory_need(scene, design)
        for tokens in (1, 100, 2047, 5000, 100_000, 262_144):
            plan = smallest_plan(scene, design, batch=1, context_tokens=tokens)
            assert need.device(tokens) >= plan.memory.kv >= QWEN.state_bytes
            assert need.host(tokens) >= plan.host_bytes

    @pytest.mark.parametrize(("depth", "layers"), [(0, 1), (1, 1), (2, 1)])
    @pytest.mark.parametrize("name", ["staged", "streamed"])
    def test_a_buffer_is_of_the_layers_on_their_way(self, name: str, depth: int, layers: int) -> None:
        design = presets.load_design(name).with_fields(prefetch_depth=depth)
        plan, without = (scene_of(model).plan(design) for model in (QWEN, QWEN.with_fields(linear=None)))
        page = plan.design.page_size * 4 * 2 * 256 * 2 * 4
        assert plan.memory.slots == layers * plan.slot_pages * page
        assert without.memory.slots == (depth + 1) * without.slot_pages * page

    def test_states_leave_less_room_for_slots(self) -> None:
        design = presets.load_design("clo")
        smaller = QWEN.with_fields(linear=QWEN.linear.model_dump() | {"state_bytes_per_value": 2.0})  # type: ignore[union-attr]
        more, less = (scene_of(model, 262_144, 8).plan(design) for model in (smaller, QWEN))
        row = less.memory.slots / less.slot_pages
        freed = 8 * (QWEN.state_bytes - smaller.state_bytes)
        assert (more.slot_pages - less.slot_pages) * row == pytest.approx(freed, abs=row)


class TestPrefill:
    def test_pairs_are_of_layers_with_keys_and_values(self) -> None:
        scene = scene_of(LLAMA)
        half = scene_of(LLAMA.with_fields(linear=LINEAR | {"layers": range(0, 32, 2)}))
        resident = presets.load_design("resident")
        whole, fewer = (prefill_prices(one, resident, chunk_tokens=64) for one in (scene, half))
        assert fewer.pair_ns == pytest.approx(whole.pair_ns / 2)

    def test_a_long_prompt_by_hand(self) -> None:
        scene, tokens = scene_of(), 4096
        found = prefill_prices(scene, presets.load_design("resident"), chunk_tokens=tokens)
        costs, linear = scene.profile.prefill_linear_attention, QWEN.linear  # type: ignore[union-attr]
        assert linear is not None
        scan = costs.latency_s + tokens * (costs.per_token_s + 48 * costs.per_head_token_s)
        free = costs.with_fields(latency_s=0.0, per_token_s=0.0, per_head_token_s=0.0)
        cheap = replace(scene, profile=scene.profile.model_copy(update={"prefill_linear_attention": free}))  # type: ignore[union-attr]
        rest = prefill_prices(cheap, presets.load_design("resident"), chunk_tokens=tokens)
        assert found.dense_ns[tokens] - rest.dense_ns[tokens] == pytest.approx(48 * scan * 1e9, abs=2)
        assert found.pairs(0, tokens) == pairs_of(0, tokens)

    def test_linear_attention_that_was_timed_counts_as_measured(self) -> None:
        scene, resident = scene_of(), presets.load_design("resident")
        timed = scene.profile.prefill_linear_attention  # type: ignore[union-attr]
        assumed = timed.with_fields(source="assumed")
        guessed = replace(scene, profile=scene.profile.model_copy(update={"prefill_linear_attention": assumed}))  # type: ignore[union-attr]
        known, less = (prefill_prices(one, resident, chunk_tokens=4096) for one in (scene, guessed))
        scan = 48 * timed.seconds(4096, 48) * 1e9
        assert known.table_share - less.table_share == pytest.approx(scan / known.dense_ns[4096], rel=1e-6)

    def test_only_offloaded_layers_come_back(self) -> None:
        scene = scene_of()
        prices = prefill_prices(scene, presets.load_design("clo"), chunk_tokens=64)
        assert prices.in_ns == pytest.approx(16 * 4096 / scene.machine.link.h2d_bytes_per_s * 1e9)

    def test_gpus_share_the_tokens_of_sequences_that_are_dealt_out(self) -> None:
        design = presets.load_design("resident")
        one = prefill_prices(scene_of(), design, chunk_tokens=512)
        eight = prefill_prices(scene_of(tensor_parallel=8, attention_by="sequences"), design, chunk_tokens=512)
        assert eight.dense_ns[512] < one.dense_ns[512]
        assert eight.hit_ns == pytest.approx(one.hit_ns / 8)


class TestKeptPrefixes:
    def test_every_block_has_a_state(self) -> None:
        design = presets.load_design("clo")
        assert hosted_block_bytes(QWEN, design, 512) == 512 * hosted_token_bytes(QWEN, design) + QWEN.state_bytes
        assert hosted_block_bytes(LLAMA, design, 512) == 512 * LLAMA.kv_bytes_per_token

    def test_it_leaves_with_the_block_and_comes_with_the_hit(self) -> None:
        scene, design = scene_of(), presets.load_design("clo")
        link = scene.machine.link
        prices = prefill_prices(scene, design, chunk_tokens=64, block_tokens=512)
        block = 512 * QWEN.kv_bytes_per_token + QWEN.state_bytes
        assert prices.out_ns == pytest.approx(block / 512 / link.d2h_bytes_per_s * 1e9)
        assert prices.hit_ns == pytest.approx(QWEN.state_bytes / link.h2d_bytes_per_s * 1e9)
        apart = prices.chunk_ns(0.0, 0, 0, [512, 512]) - prices.chunk_ns(0.0, 0, 0, [1024])
        assert apart == pytest.approx(prices.hit_ns, abs=1)

    def test_a_service_loads_a_state_for_each_hit_and_keeps_fewer_blocks(self) -> None:
        # the same prompt three times, long after each other
        trace = trace_of([(second * 10**12, 2049, 2, (1, 2, 3, 4)) for second in range(3)], 512)
        costs = worker_costs(scene_of(), presets.load_design("resident"), trace)
        assert costs.block_bytes == int(512 * QWEN.kv_bytes_per_token + QWEN.state_bytes)
        slow = replace(costs, prefill=replace(costs.prefill, hit_ns=1e12))
        once, twice = (serve(trace, one, ServiceSettings()).replicas[0].tally for one in (costs, slow))
        assert once.prefix_hit_tokens == twice.prefix_hit_tokens == 2 * 2048
        assert twice.prefill_ns == pytest.approx(once.prefill_ns + 2e12, rel=0.05)

    def test_a_prompt_goes_on_where_a_state_was_kept(self) -> None:
        # four blocks to the token: the last token must be computed, and before it the last state is a block back
        trace = trace_of([(second * 10**12, 2048, 2, (1, 2, 3, 4)) for second in range(2)], 512)
        hits = {}
        for model in (QWEN, QWEN.with_fields(linear=None)):
            costs = worker_costs(scene_of(model), presets.load_design("resident"), trace)
            hits[model] = serve(trace, costs, ServiceSettings()).replicas[0].tally.prefix_hit_tokens
            assert costs.reused_tokens(4, 512, 2049) == 2048
            assert costs.reused_tokens(0, 512, 0) == 0
        assert list(hits.values()) == [1536, 2047]


def test_a_request_alone_waits_as_long_as_its_prompt_takes() -> None:
    trace = trace_of([(0, 20_000, 2)])
    costs = worker_costs(scene_of(), presets.load_design("resident"), trace)
    tally = serve(trace, costs, ServiceSettings()).replicas[0].tally
    assert tally.prefill_ns == pytest.approx(costs.alone_ns(20_000), abs=20)
