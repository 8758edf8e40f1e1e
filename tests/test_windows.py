"""Layers with a sliding window: they keep what is in it, nothing of theirs moves, and the others are as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_service import trace_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.plan import make_plan
from clo.schedule import record_step
from clo.schedule.work import DecodeAttention
from clo.specs import ModelSpec, Workload, model_from_hf_config
from clo_sim.run import simulate
from clo_sim.scene import Scene
from clo_sim.serving import ServiceSettings, serve, worker_costs
from clo_sim.serving.memory import memory_need, smallest_plan
from clo_sim.serving.prefill import prefill_prices
from clo_sim.serving.prefill_attention import pairs_in_window, pairs_of
from clo_sim.worth import worth_of_choices

DESIGNS = sorted(presets.names("designs"))
LLAMA = presets.load_model("llama-3-8b")
EVERY_OTHER = {"window_tokens": 512, "windowed_layers": tuple(range(0, 32, 2))}


def own_scene(**changes: Any) -> Scene:
    """The recorded model, whose trace stands for itself."""
    model = presets.load_model("smollm2-135m").with_fields(**changes)
    return clo_sim.make_scene(model, "h200", context_tokens=4096, batch=1)


def scene_of(model: ModelSpec, context_tokens: int = 16384, batch: int = 2) -> Scene:
    return clo_sim.make_scene(model, "h200", context_tokens=context_tokens, batch=batch)


class TestAnyDesign:
    @pytest.mark.parametrize("name", [name for name in DESIGNS if name not in ("resident", "streamed")])
    def test_a_window_as_long_as_the_context_is_a_dense_layer(self, name: str) -> None:
        design = presets.load_design(name)
        dense = simulate(own_scene(), design.with_fields(dense_layers=3))
        windowed = simulate(
            own_scene(window_tokens=4096, windowed_layers=(0, 1, 2)), design.with_fields(dense_layers=0)
        )
        assert windowed.tpot_s == pytest.approx(dense.tpot_s, rel=1e-12)
        assert windowed.memory == dense.memory
        assert windowed.h2d_bytes_per_step == dense.h2d_bytes_per_step
        assert windowed.overlap == dense.overlap

    @pytest.mark.parametrize("name", DESIGNS)
    def test_every_design_runs_a_real_model_of_this_kind(self, name: str) -> None:
        scene = scene_of(presets.load_model("gemma-3-27b"))
        clock, simpy = (simulate(scene, name, executor=executor) for executor in ("clock", "simpy"))  # type: ignore[arg-type]
        assert 0 < clock.tpot_s <= simpy.tpot_s * (1 + 1e-9)


class TestStep:
    def test_layers_attend_to_what_they_keep(self) -> None:
        scene = scene_of(LLAMA.with_fields(**EVERY_OTHER))
        nodes = record_step(scene.plan(presets.load_design("resident"))).nodes
        tokens = {node.op.layer: node.op.work.kv_tokens for node in nodes if isinstance(node.op.work, DecodeAttention)}
        assert tokens == {layer: 16384 if layer % 2 else 512 for layer in range(32)}

    def test_what_is_selected_and_fetched_is_of_the_others(self) -> None:
        scene = scene_of(LLAMA.with_fields(**EVERY_OTHER))
        for name in ("clo", "streamed", "staged", "recall"):
            nodes = record_step(scene.plan(presets.load_design(name))).nodes
            moved = {node.op.layer for node in nodes if node.op.part in ("selection", "transfer")}
            first = 1 if name == "streamed" else 3
            assert moved == set(range(first, 32, 2))

    def test_without_transfers_a_step_is_shorter_by_its_attention(self) -> None:
        scenes = [scene_of(model) for model in (LLAMA, LLAMA.with_fields(**EVERY_OTHER))]
        whole, windowed = (simulate(scene, "resident", executor="clock") for scene in scenes)
        difference = whole.ops["attention"].seconds - windowed.ops["attention"].seconds
        assert difference > 0
        assert whole.tpot_s - windowed.tpot_s == pytest.approx(difference, rel=1e-9)

    def test_the_roofline_reads_windows_and_pages(self) -> None:
        model = LLAMA.with_fields(**EVERY_OTHER)
        roof = simulate(scene_of(model), "resident", executor="clock").roofline
        attended = 2 * (16 * 16384 + 16 * 512) * model.layer_token_bytes
        assert roof.hbm_bytes == pytest.approx(model.step_weight_bytes(2) + attended)


class TestMemory:
    def test_by_hand(self) -> None:
        model = LLAMA.with_fields(**EVERY_OTHER)
        assert model.kv_bytes_per_token == 16 * 4096
        machine, load = presets.load_machine("h200"), Workload(context_tokens=16384, batch=2)
        kept = 2 * (16 * 16384 + 16 * 512) * 4096
        assert make_plan(model, machine, presets.load_design("resident"), load).memory.kv == kept
        plan = make_plan(model, machine, presets.load_design("clo").with_fields(slot_budgets=1.0), load)
        # layer 1 is dense, sixteen layers have a window, fifteen are offloaded
        assert plan.sparse_layers == tuple(range(3, 32, 2))
        assert plan.memory.dense_layers == 2 * (16384 + 16 * 512) * 4096
        assert plan.memory.slots == 2 * 15 * plan.budget_pages * 16 * 4096
        assert plan.host_bytes == 2 * 15 * 16384 * 4096

    def test_a_context_shorter_than_the_window_is_kept_whole(self) -> None:
        model = LLAMA.with_fields(window_tokens=8192, windowed_layers=(0, 5))
        resident, load = presets.load_design("resident"), Workload(context_tokens=4096, batch=1)
        plans = (make_plan(one, presets.load_machine("h200"), resident, load) for one in (model, LLAMA))
        assert len({plan.memory.kv for plan in plans}) == 1

    @pytest.mark.parametrize("name", ["resident", "clo", "streamed"])
    def test_a_service_never_counts_less_than_a_sequence_needs(self, name: str) -> None:
        scene, design = scene_of(LLAMA.with_fields(**EVERY_OTHER | {"window_tokens": 3000})), presets.load_design(name)
        need = memory_need(scene, design)
        for tokens in (100, 2047, 2999, 3000, 3001, 5000, 100_000):
            plan = smallest_plan(scene, design, batch=1, context_tokens=tokens)
            assert need.device(tokens) >= plan.memory.kv
            assert need.host(tokens) >= plan.host_bytes

    @pytest.mark.parametrize("window", [65_537, 100_000, 131_071])
    def test_a_window_close_to_the_longest_context_costs_a_short_sequence_little(self, window: int) -> None:
        scene = scene_of(LLAMA.with_fields(**EVERY_OTHER | {"window_tokens": window, "max_positions": 131_072}))
        design = presets.load_design("resident")
        need = memory_need(scene, design)
        for tokens in (1000, 50_000, 131_072):
            needed = smallest_plan(scene, design, batch=1, context_tokens=tokens).memory.kv
            assert needed <= need.device(tokens) <= needed + 16 * 65_536 * LLAMA.layer_token_bytes

    def test_gpus_share_the_heads_of_windowed_layers_too(self) -> None:
        model = presets.load_model("gemma-3-27b")
        resident, load = presets.load_design("resident"), Workload(context_tokens=8192, batch=1)
        machines = [presets.load_machine("h200").with_fields(tensor_parallel=gpus) for gpus in (1, 4)]
        one, four = (make_plan(model, machine, resident, load).memory.kv for machine in machines)
        assert one == 4 * four


class TestPrefill:
    def test_a_long_prompt_is_shorter_by_what_windows_do_not_attend(self) -> None:
        model = LLAMA.with_fields(**EVERY_OTHER)
        whole, windowed = (
            prefill_prices(scene_of(one), presets.load_design("resident"), chunk_tokens=1024) for one in (LLAMA, model)
        )
        prompt = 65_536
        pair_ns = whole.pair_ns / 32
        saved = 16 * pair_ns * (pairs_of(0, prompt) - (pairs_of(0, 512) + (prompt - 512) * 512))
        assert whole.alone_ns(prompt) - windowed.alone_ns(prompt) == pytest.approx(saved, rel=1e-6)

    @pytest.mark.parametrize("tokens", [1, 100, 511, 512])
    def test_a_prompt_within_the_window_takes_as_long_as_without(self, tokens: int) -> None:
        whole, windowed = (
            prefill_prices(scene_of(one), presets.load_design("resident"), chunk_tokens=200)
            for one in (LLAMA, LLAMA.with_fields(**EVERY_OTHER))
        )
        assert windowed.alone_ns(tokens) == pytest.approx(whole.alone_ns(tokens), abs=3)

    @given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 60))
    def test_pairs_in_a_window_are_counted_token_by_token(self, start: int, tokens: int, window: int) -> None:
        each = [min(place + 0.5, window) for place in range(start, start + tokens)]
        assert pairs_in_window(start, tokens, window) == pytest.approx(sum(each))

    def test_attention_in_windows_is_not_among_what_tables_price(self) -> None:
        plain, windowed = (
            prefill_prices(scene_of(one), presets.load_design("resident"), chunk_tokens=2048)
            for one in (LLAMA, LLAMA.with_fields(**EVERY_OTHER))
        )
        assert list(windowed.dense_ns) == list(plain.dense_ns)

    def test_only_layers_that_are_offloaded_come_back(self) -> None:
        model = LLAMA.with_fields(**EVERY_OTHER)
        scene = scene_of(model)
        prices = prefill_prices(scene, presets.load_design("clo"), chunk_tokens=64)
        rate = scene.machine.link.h2d_bytes_per_s
        assert prices.in_ns == pytest.approx(15 * 4096 / rate * 1e9)
        assert prices.cached_in_ns == pytest.approx(1 * 4096 / rate * 1e9)

    @pytest.mark.parametrize("keeps_prefixes", [False, True])
    def test_what_windows_hold_does_not_leave(self, keeps_prefixes: bool) -> None:
        scene = scene_of(LLAMA.with_fields(**EVERY_OTHER))
        design = presets.load_design("clo")
        prices = prefill_prices(scene, design, chunk_tokens=64, block_tokens=512 if keeps_prefixes else 0)
        layers = 16 if keeps_prefixes else 15
        assert prices.out_ns == pytest.approx(layers * 4096 / scene.machine.link.d2h_bytes_per_s * 1e9)

    def test_a_request_alone_waits_as_long_as_its_prompt_takes(self) -> None:
        trace = trace_of([(0, 20_000, 2)])
        costs = worker_costs(scene_of(LLAMA.with_fields(**EVERY_OTHER)), presets.load_design("resident"), trace)
        tally = serve(trace, costs, ServiceSettings()).replicas[0].tally
        assert tally.prefill_ns == pytest.approx(costs.alone_ns(20_000), abs=20)


def test_dense_layers_that_have_a_window_anyway_change_nothing() -> None:
    scene = scene_of(presets.load_model("gemma-3-27b"))
    choices = worth_of_choices(scene, simulate(scene, "clo"), {"dense_layers": (0, 4, 6)})
    none, same, more = choices.alternatives
    assert none.note == same.note == "offloads the same layers"
    assert none.tpot_s == pytest.approx(choices.best_tpot_s, rel=1e-3)  # other recorded heads stand in
    assert more.note.startswith("changes the answers")


class TestSpecs:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"window_tokens": 512}, "windowed_layers and window_tokens go together"),
            ({"windowed_layers": (1,)}, "windowed_layers and window_tokens go together"),
            ({"window_tokens": 512, "windowed_layers": (3, 2)}, r"windowed_layers = \[3, 2\] must ascend"),
            ({"window_tokens": 512, "windowed_layers": (1, 1)}, r"windowed_layers = \[1, 1\] must ascend"),
            ({"window_tokens": 512, "windowed_layers": (32,)}, "32 must be less than num_layers = 32"),
            ({"window_tokens": 512, "windowed_layers": (-1,)}, "windowed_layers"),
            ({"window_tokens": 512, "windowed_layers": tuple(range(32))}, "must leave a layer that attends to"),
            ({"window_tokens": 0, "windowed_layers": (1,)}, "window_tokens = 0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            LLAMA.with_fields(**fields)

    def test_gemma_weighs_what_its_makers_say(self) -> None:
        # 27 billion without the vision encoder
        assert presets.load_model("gemma-3-27b").weight_bytes / 2 == pytest.approx(27e9, rel=5e-3)


class TestConfigs:
    GEMMA: ClassVar[dict[str, Any]] = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    }

    @staticmethod
    def read(folder: Path, config: dict[str, Any]) -> ModelSpec:
        (folder / "config.json").write_text(json.dumps(config))
        return model_from_hf_config(folder)

    def test_layer_types(self, tmp_path: Path) -> None:
        model = self.read(tmp_path, {"model_type": "gemma3", "text_config": self.GEMMA})
        assert (model.window_tokens, model.windowed_layers) == (1024, (0, 1, 2, 3, 4))

    def test_embeddings_of_gemma_are_tied_unless_it_says_otherwise(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, self.GEMMA).tied_embeddings
        assert not self.read(tmp_path, self.GEMMA | {"tie_word_embeddings": False}).tied_embeddings
        assert not self.read(tmp_path, self.GEMMA | {"model_type": "olmo3"}).tied_embeddings

    def test_a_window_that_limits_nothing_is_none(self, tmp_path: Path) -> None:
        model = self.read(tmp_path, self.GEMMA | {"sliding_window": 131072})
        assert (model.window_tokens, model.windowed_layers) == (None, ())

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"layer_types": ["linear_attention"] * 5 + ["full_attention"]}, "layer_types: linear_attention"),
            ({"layer_types": ["sliding_attention"] * 6}, "one that attends to the whole context"),
            ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types: one for each layer"),
            ({"sliding_window": None}, "sliding_window = None: layer_types needs a number"),
            ({"model_type": "gemma4_text"}, "windows of model_type = 'gemma4_text' are not known"),
            ({"layer_types": 3}, "layer_types = 3: must be a list"),
            ({"layer_types": None}, "sliding_window = 1024: which layers have it is not said"),
        ],
    )
    def test_what_is_not_known_is_refused(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        with pytest.raises(SpecError, match=problem):
            self.read(tmp_path, self.GEMMA | changes)
