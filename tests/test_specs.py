"""Bad input is an error that names the field, the value and the rule; memory adds up; presets fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import make_trace, random_trace, tiny_design, tiny_machine, tiny_model, tiny_profile, tiny_scene

import clo_sim
from clo import presets
from clo.errors import CloError, NotFoundError, ProfileError, SpecError, TraceError
from clo.plan import make_plan
from clo.profile import load_profile
from clo.specs import Design, MachineSpec, ModelSpec, Workload, model_from_hf_config
from clo.specs.overrides import apply, parse_overrides
from clo_sim.scene import Scene
from clo_sim.stand_in import TrafficSource

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


QWEN = {
    "model_type": "qwen2",
    "num_hidden_layers": 48,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
}

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([-1e300, -1.0, 0.0, 0.05, 0.5, 1.5, 1e9, math.inf, -math.inf, math.nan])
    | st.sampled_from(["", "fit", "lru", "exact", "graph", "gpu", "minimum", "\n"])
    | st.lists(st.integers(), max_size=1)
)

SOURCE = TrafficSource(presets.load_trace())


def scene_of(*names: str, **changes: Any) -> Scene:
    """A scene whose trace has been read before."""
    return clo_sim.make_scene(*names, source=SOURCE, **changes)


PLANNED = scene_of(context_tokens=8192, batch=2)


class TestFields:
    @given(st.dictionaries(st.sampled_from([*Design.model_fields, "tua"]), ANYTHING, min_size=1, max_size=3))
    @settings(max_examples=300, deadline=None)
    def test_anything_is_a_design_that_can_be_planned_or_one_line_that_says_no(self, changes: dict[str, Any]) -> None:
        try:
            plan = PLANNED.plan(Design.parse(changes))
        except SpecError as refusal:
            line = str(refusal)
            assert line.startswith("design")
            assert "\n" not in line
            return
        assert plan.budget_pages <= plan.slot_pages <= plan.num_pages
        assert plan.memory.total <= PLANNED.machine.gpu.memory_bytes
        assert min(plan.memory.window, plan.memory.index, plan.memory.slots, plan.memory.dense_layers) >= 0

    @given(
        st.sampled_from(
            ["gpu.memory_bytes", "gpu.num_sms", "link.h2d_bytes_per_s", "host.num_threads", "reserve_bytes"]
        ),
        ANYTHING,
    )
    @settings(max_examples=60, deadline=None)
    def test_anything_is_a_machine_or_one_line_that_says_no(self, field: str, value: Any) -> None:
        try:
            machine = apply(PLANNED.machine, {tuple(field.split(".")): value}, "machine")
            make_plan(PLANNED.model, machine, Design(), PLANNED.workload)
        except SpecError as refusal:
            line = str(refusal)
            assert "\n" not in line

    @pytest.mark.parametrize(
        ("data", "parts"),
        [
            ({"taus": 0.9}, ["design.taus", "unknown field", "did you mean tau?"]),
            ({"tau": 3.0}, ["design.tau", "3.0", "less than or equal to 2"]),
            ({"page_size": 0}, ["design.page_size", "0", "greater than 0"]),
            ({"budget_fraction": 0}, ["design.budget_fraction", "greater than 0"]),
            ({"transfer": "pigeon"}, ["design.transfer", "pigeon", "gpu_zero_copy"]),
            ({"slot_pages": 4, "slot_budgets": 2}, ["slot_pages and slot_budgets", "set one"]),
            ({"attend": "full", "cache": "lru"}, ["attend = full", "cache must be resident or none"]),
            ({"prefetch_query": "previous_step"}, ["prefetch_query = previous_step", "cache must be lru"]),
            ({"num_sink_tokens": 20}, ["num_sink_tokens = 20", "16 tokens"]),
            ({"tau_importance_power": -1}, ["design.tau_importance_power", "greater than or equal to 0"]),
            ({"tau_importance_power": 1, "target_hit_rate": 0.5}, ["both set tau per head", "set one"]),
            ({"target_hit_rate": 1.0}, ["design.target_hit_rate", "less than 1"]),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_a_design_says_what_is_wrong(self, data: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises(SpecError) as failure:
            Design.parse(data)
        message = str(failure.value)
        assert "\n" not in message
        assert all(part in message for part in parts), message

    @pytest.mark.parametrize(
        ("cls", "data", "line"),
        [
            (Design, {"tau": True}, "design.tau = True: must be a number, not true or false"),
            (Design, {"slot_pages": False}, "design.slot_pages = False: must be a number, not true or false"),
            (Workload, {"batch": True}, "workload.batch = True: must be a number, not true or false"),
        ],
        ids=["float", "optional integer", "workload"],
    )
    def test_truth_is_no_number(self, cls: Any, data: dict[str, Any], line: str) -> None:
        with pytest.raises(SpecError) as failure:
            cls.parse(data)
        assert str(failure.value) == line

    def test_truth_is_a_value_where_it_is_asked_for(self) -> None:
        assert ModelSpec.parse(tiny_model().model_dump() | {"tied_embeddings": True}).tied_embeddings

    def test_negative_bandwidth(self) -> None:
        data = tiny_machine().model_dump()
        data["link"]["h2d_bytes_per_s"] = -1.0
        with pytest.raises(SpecError, match=r"machine\.link\.h2d_bytes_per_s = -1\.0: .*greater than 0"):
            MachineSpec.parse(data)

    def test_heads_must_group_evenly(self) -> None:
        with pytest.raises(SpecError, match="num_query_heads = 3 must be a multiple of num_kv_heads = 2"):
            ModelSpec.parse(tiny_model().model_dump() | {"num_query_heads": 3})

    @pytest.mark.parametrize(
        ("cls", "data", "field"),
        [
            (Workload, {"steps": 0}, "workload.steps = 0"),
            (Workload, {"batch": -1}, "workload.batch = -1"),
            (Workload, {"context_tokens": 1.5}, "workload.context_tokens = 1.5"),
            (Workload, {"warmup_steps": -1}, "workload.warmup_steps = -1"),
            (Workload, {"sedd": 1}, "workload.sedd: unknown field (did you mean seed?)"),
            (ModelSpec, {}, "model.name: a value is required"),
        ],
        ids=str,
    )
    def test_workloads_and_models_say_what_is_wrong(self, cls: Any, data: dict[str, Any], field: str) -> None:
        with pytest.raises(SpecError) as failure:
            cls.parse(data)
        assert str(failure.value).startswith(field)

    def test_nothing_can_be_changed_afterwards(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Design().tau = 0.5  # type: ignore[misc]

    @given(st.floats(-1, 2), st.integers(1, 64), st.sampled_from(["diff", "replace"]))
    @settings(max_examples=40, deadline=None)
    def test_with_fields_keeps_the_rest(self, tau: float, page_size: int, on_miss: str) -> None:
        design = Design(name="x", num_sink_tokens=0, tau=tau, page_size=page_size, on_miss=on_miss)
        assert design.with_fields(tau=design.tau) == design
        assert design.with_fields(name="y").with_fields(name="x") == design
        with pytest.raises(SpecError):
            design.with_fields(tau=3.0)


class TestPlan:
    """Rules that need more than one record."""

    def test_a_budget_larger_than_the_context(self) -> None:
        scene = tiny_scene(random_trace(0))
        with pytest.raises(SpecError, match=r"design\.budget_pages = 99: the context holds only 16 pages"):
            scene.plan(tiny_design(99, slot_pages=None))

    def test_slots_below_the_budget(self) -> None:
        scene = tiny_scene(random_trace(0))
        with pytest.raises(SpecError, match=r"design\.slot_pages = 3: must hold at least the budget of 4 pages"):
            scene.plan(tiny_design(4, slot_pages=3))

    def test_a_context_beyond_the_models_positions(self) -> None:
        scene = scene_of("smollm2-135m", context_tokens=10_000)
        with pytest.raises(SpecError, match=r"workload\.context_tokens = 10000: smollm2-135m accepts at most 8192"):
            scene.plan(presets.load_design("clo"))

    def test_a_model_that_fits_no_memory(self) -> None:
        scene = scene_of("llama-3-70b", context_tokens=4096, batch=1)
        with pytest.raises(SpecError, match=r"weights take 141 GB .*machine\.gpu\.memory_bytes"):
            scene.plan(presets.load_design("clo"))

    def test_kv_that_does_not_fit_says_how_much_is_missing_and_what_to_change(self) -> None:
        scene = scene_of(context_tokens=131072, batch=16)
        with pytest.raises(SpecError, match=r"needs 275 GB of device memory, h200 has 121 GB left for KV: offload"):
            scene.plan(presets.load_design("resident"))
        with pytest.raises(SpecError, match=r"lower design\.budget_fraction"):
            scene.plan(presets.load_design("clo").with_fields(dense_layers=16))

    def test_host_memory_runs_out_too(self) -> None:
        scene = scene_of(context_tokens=600_000, batch=16)
        with pytest.raises(SpecError, match=r"machine\.host\.memory_bytes"):
            scene.plan(presets.load_design("streamed"))

    @pytest.mark.parametrize(("context", "pages"), [(100, 7), (1024, 16), (2560, 16), (2720, 17), (131072, 819)])
    def test_a_budget_by_share_has_a_least_that_a_short_context_may_not_hold(self, context: int, pages: int) -> None:
        design = presets.load_design("clo").with_fields(min_budget_pages=16)
        assert scene_of(context_tokens=context, batch=1).plan(design).budget_pages == pages
        fixed = design.with_fields(budget_pages=3)
        assert scene_of(context_tokens=context, batch=1).plan(fixed).budget_pages == 3

    def test_memory_of_the_main_job_by_hand(self) -> None:
        plan = scene_of(context_tokens=131072, batch=16).plan(presets.load_design("clo"))
        sequence = 131072 * 32 * 8 * 2 * 128 * 2
        assert plan.model.kv_bytes_per_token == 131072
        assert plan.memory.dense_layers == 16 * sequence * 2 / 32
        # 4-bit keys: 64 bytes and a step and an offset of two bytes each, for every token of 512 bytes
        assert plan.memory.index == 16 * sequence * 30 / 32 * 68 / 512
        assert plan.budget_pages == 819
        assert plan.page_bytes == 16 * 512
        assert plan.memory.weights == pytest.approx(16.06e9, rel=0.001)
        assert plan.host_bytes == 16 * sequence * 30 / 32
        # attention reads budget, sinks and window
        assert plan.attended_tokens == 819 * 16 + 4 + 64

    @pytest.mark.parametrize(
        ("selector", "share"),
        [
            # of the 512 bytes a token takes: its key (256), two vectors a page, one vector a page, 128 codes of half
            # a byte with a step and an offset, 128 bits
            ("exact", 1 / 2),
            ("page_minmax", 1 / 16),
            ("page_mean", 1 / 32),
            ("key_4bit", 68 / 512),
            ("sign_hash", 1 / 32),
        ],
    )
    def test_the_index_by_hand(self, selector: str, share: float) -> None:
        scene = scene_of(context_tokens=16384, batch=1)
        design = presets.load_design("clo").with_fields(selector=selector, dense_layers=0, slot_budgets=1)
        plan = scene.plan(design)
        assert plan.memory.index == pytest.approx(16384 * 131072 * share)
        assert plan.index_bytes_per_head == pytest.approx(16384 * 512 * share)

    def test_pinned_heads_window_and_slots_by_hand(self) -> None:
        scene = scene_of(context_tokens=16384, batch=2)
        design = presets.load_design("clo").with_fields(pinned_head_fraction=0.25, slot_budgets=2)
        memory = scene.plan(design).memory
        # two of eight heads of 30 layers are pinned: their 16384 tokens of 512 bytes, two sequences
        assert memory.pinned_heads == 30 * 2 * 2 * 16384 * 512
        # the other six keep sinks, window and the page between them, an index, and 2 x 102 slots of 16 tokens
        heads = 30 * 6 * 2
        assert memory.window == heads * (4 + 64 + 16) * 512
        assert memory.index == heads * 16384 * (64 + 4)
        assert memory.slots == heads * 204 * 16 * 512
        assert memory.kv == memory.dense_layers + memory.pinned_heads + memory.window + memory.index + memory.slots
        assert memory.total == memory.kv + memory.weights + 4e9

    def test_the_roofline_by_hand(self) -> None:
        scene = scene_of("smollm2-135m", workload=Workload(context_tokens=4096, batch=2, steps=1))
        model, roof = scene.model, clo_sim.simulate(scene, "resident").roofline
        weights = 30 * (576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536) + 49152 * 576
        assert model.weight_bytes == 2 * weights
        # keys and values of 3 heads of 64 in bf16, 30 layers, two sequences
        assert roof.hbm_bytes == 2 * weights + 2 * 30 * 4096 * 3 * 2 * 64 * 2
        # two operations a weight and token; in attention, four per query head, key and element
        flops = 2 * (2 * weights + 30 * 4096 * 4 * 9 * 64)
        assert roof.compute_s == pytest.approx(flops / scene.machine.gpu.peak_flops_per_s)
        assert roof.h2d_bytes == 0
        assert roof.seconds == roof.hbm_s == roof.hbm_bytes / scene.machine.gpu.hbm_bytes_per_s

    def test_the_roofline_reads_what_a_step_must_read(self) -> None:
        scene = scene_of(workload=Workload(context_tokens=4096, batch=1, steps=1))
        needed = 2 * 32 * scene.model.layer_weight_values(0) + 128256 * 4096 * 2 + 4096 * 131072
        # a row of the embedding beside it
        assert clo_sim.simulate(scene, "resident").roofline.hbm_bytes <= needed + 4096 * 2

    def test_without_a_cache_layers_share_their_buffers(self) -> None:
        scene = scene_of(context_tokens=16384, batch=1)
        one, two, three = (
            scene.plan(presets.load_design("staged").with_fields(prefetch_depth=depth)).memory.slots
            for depth in (0, 1, 2)
        )
        assert one == 8 * 102 * 16 * 512
        assert (two, three) == (2 * one, 3 * one)

    @pytest.mark.parametrize("name", [name for name in presets.names("designs") if "resident" not in name])
    def test_designs_compete_for_equal_memory(self, name: str) -> None:
        scene = scene_of(context_tokens=131072, batch=16)
        plan = scene.plan(presets.load_design(name))
        free = scene.machine.gpu.memory_bytes - scene.machine.reserve_bytes - scene.model.weight_bytes
        assert plan.memory.kv <= free
        if plan.design.cache in ("lru", "head_reuse") and plan.design.on_miss == "diff":
            one_more_row = 30 * 8 * 16 * plan.page_bytes
            assert plan.memory.kv + one_more_row > free

    def test_a_cap_on_kv_memory(self) -> None:
        full, capped = (scene_of(kv_memory_bytes=cap) for cap in (None, 80e9))
        design = presets.load_design("clo")
        assert capped.plan(design).memory.kv <= 80e9
        assert capped.plan(design).slot_pages < full.plan(design).slot_pages

    @pytest.mark.parametrize("machine", presets.names("machines"))
    @pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-14b"])
    def test_every_preset_loads_and_runs(self, machine: str, model: str) -> None:
        workload = Workload(context_tokens=16384, batch=1, steps=2)
        result = clo_sim.simulate(scene_of(model, machine, workload=workload), "clo")
        assert 0 < result.tpot_s < 1

    @pytest.mark.parametrize("share", [0.25, 0.5])
    def test_a_gpu_of_slower_memory_takes_longer_and_nothing_of_it_is_measured(self, share: float) -> None:
        machine = presets.load_machine("h200")
        gpu = machine.gpu.with_fields(hbm_bytes_per_s=machine.gpu.hbm_bytes_per_s * share)
        workload = Workload(context_tokens=32768, batch=1, steps=2)
        known, slow = (
            clo_sim.simulate(scene_of(machine=one, workload=workload), "resident")
            for one in (machine, machine.with_fields(gpu=gpu))
        )
        # weights and KV of a step come from memory, whatever its speed
        assert slow.tpot_s > slow.roofline.seconds > known.tpot_s
        assert slow.measured_share == 0 < known.measured_share
        assert [line for line in slow.assumptions if "measured on NVIDIA H200" in line]
        assert not [line for line in known.assumptions if "measured on" in line]

    @pytest.mark.parametrize("name", presets.names("designs"))
    def test_every_design_runs(self, name: str) -> None:
        scene = scene_of("smollm2-135m", workload=Workload(context_tokens=4096, batch=1, steps=2))
        assert 0 < clo_sim.simulate(scene, name).tpot_s < 1

    @pytest.mark.parametrize("context", [100, 1000, 1023])
    @pytest.mark.parametrize("name", presets.names("designs"))
    def test_short_contexts_run_too(self, name: str, context: int) -> None:
        scene = scene_of("smollm2-135m", workload=Workload(context_tokens=context, batch=1, steps=1))
        result = clo_sim.simulate(scene, name)
        assert 0 < result.tpot_s < 1
        assert 1 <= result.budget_pages <= result.num_pages == -(-context // 16)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("name", ["clo", "streamed", "recall"])
    def test_all_heads_pinned(self, name: str) -> None:
        scene = scene_of("smollm2-135m", workload=Workload(context_tokens=4096, batch=1, steps=1))
        design = presets.load_design(name).with_fields(pinned_head_fraction=1.0)
        assert clo_sim.simulate(scene, design).h2d_bytes_per_step == 0

    def test_pinned_heads_are_not_streamed(self) -> None:
        scene = scene_of(workload=Workload(context_tokens=16384, batch=1, steps=1))
        result = clo_sim.simulate(scene, presets.load_design("streamed").with_fields(pinned_head_fraction=0.5))
        moved = result.ops["prefetch.copy_pages"].num_bytes
        assert moved == result.h2d_bytes_per_step == 32 * 4 * 16384 * 512

    def test_a_streamed_context_need_not_fill_its_last_page(self) -> None:
        scene = scene_of(workload=Workload(context_tokens=1000, batch=1, steps=1))
        result = clo_sim.simulate(scene, "streamed")
        assert result.h2d_bytes_per_step == result.ops["prefetch.copy_pages"].num_bytes == 1000 * 131072


class TestSceneFromPython:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"machine": 3}, "machine = 3: must be a name, a path or a MachineSpec"),
            ({"machine": None}, "machine = None: must be a name, a path or a MachineSpec"),
            ({"model": 3}, "model = 3: must be a name, a path or a ModelSpec"),
            ({"profile": 3}, "profile = 3: must be a name, a path or a Profile"),
            ({"workload": 3}, "workload = 3: must be a Workload"),
            ({"source": 3}, "source = 3: must be a TrafficSource"),
            ({"kv_memory_bytes": -1.0}, "kv_memory_bytes = -1: must be positive"),
            ({"kv_memory_bytes": float("nan")}, "kv_memory_bytes = nan: must be positive"),
        ],
        ids=str,
    )
    def test_what_is_no_scene_is_said_in_a_line(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError) as refused:
            clo_sim.make_scene(**{"source": SOURCE} | given)
        assert str(refused.value) == message

    @pytest.mark.parametrize("design", [3, None, {"tau": 0.9}])
    def test_so_is_what_is_no_design(self, design: Any) -> None:
        with pytest.raises(SpecError, match="must be a name, a path or a Design"):
            clo_sim.simulate(PLANNED, design)

    def test_so_is_an_executor_that_nobody_knows(self) -> None:
        executor: Any = "machine"
        with pytest.raises(SpecError, match="executor = 'machine': must be one of clock, simpy"):
            clo_sim.simulate(PLANNED, "clo", executor=executor)

    def test_paths_are_as_good_as_names(self) -> None:
        by_name = scene_of("qwen2.5-14b", "l40s", profile="l40s", batch=1)
        path = {kind: presets.folder(kind) for kind in ("models", "machines", "profiles")}
        machine, profile = path["machines"] / "l40s.toml", path["profiles"] / "l40s.json"
        by_path = clo_sim.make_scene(
            path["models"] / "qwen2.5-14b.toml", machine, profile=profile, batch=1, source=SOURCE
        )
        assert by_path.model == by_name.model
        assert by_path.machine.gpu == by_name.machine.gpu
        assert by_path.profile == by_name.profile


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


class TestFiles:
    def profile_file(self, tmp_path: Path, **changes: Any) -> Path:
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(tiny_profile().model_dump(mode="json") | changes))
        return path

    def test_a_profile_survives_the_file(self, tmp_path: Path) -> None:
        assert load_profile(self.profile_file(tmp_path)) == tiny_profile()

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"schema_version": 2}, "schema_version = 2"),
            ({"zero_copy": {"source": "assumed"}}, "profile.zero_copy.latency_s: a value is required"),
            ({"kernel_launch": {"source": "guessed", "seconds": 1}}, "profile.kernel_launch.source = 'guessed'"),
            ({"stream_sync": {"source": "assumed", "seconds": -1}}, "profile.stream_sync.seconds = -1"),
            ({"warp_drive": 1}, "profile.warp_drive: unknown field"),
        ],
        ids=["newer", "missing", "source", "negative", "unknown"],
    )
    def test_a_bad_profile_names_file_and_field(self, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
        path = self.profile_file(tmp_path, **changes)
        with pytest.raises(ProfileError) as failure:
            load_profile(path)
        assert str(path) in str(failure.value)
        assert problem in str(failure.value)
        assert "\n" not in str(failure.value)

    @pytest.mark.parametrize(
        "content", ["", '{"name": "x"', "[]", "\x00"], ids=["empty", "truncated", "list", "binary"]
    )
    def test_no_profile_at_all(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "profile.json"
        path.write_text(content)
        with pytest.raises(ProfileError, match=r"profile\.json"):
            load_profile(path)

    def test_a_hugging_face_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        for where in (tmp_path, tmp_path / "config.json"):
            model = model_from_hf_config(where)
            assert model.name == tmp_path.name
            assert (model.head_dim, model.num_kv_heads, model.kv_bytes_per_token) == (128, 8, 131072)

    def test_a_qwen_config(self, tmp_path: Path) -> None:
        path = tmp_path / "qwen.json"
        path.write_text(json.dumps(QWEN))
        model = model_from_hf_config(path)
        assert (model.name, model.num_layers, model.group_size, model.head_dim) == ("qwen", 48, 5, 128)
        assert model.kv_bytes_per_token == 48 * 8 * 2 * 128 * 2
        assert model.max_positions == 32768
        # tied: one matrix for embedding and head; Q, O of 40 heads, K, V of 8, three MLP matrices
        layer = 5120 * 128 * (2 * 40 + 2 * 8) + 3 * 5120 * 13824
        assert model.weight_bytes == 2 * (48 * layer + 152064 * 5120)

    @pytest.mark.parametrize(
        "config",
        [
            LLAMA | {"num_attention_heads": 0},
            LLAMA | {"num_attention_heads": "32"},
            LLAMA | {"hidden_size": None},
            {"text_config": None},
        ],
        ids=["no heads", "text", "null", "null text_config"],
    )
    def test_a_config_of_the_wrong_values(self, tmp_path: Path, config: dict[str, Any]) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        with pytest.raises(SpecError, match=r"config\.json: "):
            model_from_hf_config(path)

    def test_variants_of_a_config(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"text_config": LLAMA | {"head_dim": 64, "num_key_value_heads": None}}))
        model = model_from_hf_config(path)
        assert (model.head_dim, model.num_kv_heads) == (64, 32)

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_local_experts": 8}, "num_local_experts = 8: experts of model_type = None are not known"),
            ({"num_experts": 128}, "num_experts = 128: experts of model_type = None are not known"),
            ({"n_routed_experts": 256}, "n_routed_experts = 256: experts of model_type = None"),
            ({"kv_lora_rank": 512}, "kv_lora_rank = 512: latent attention"),
            ({"quantization_config": {"bits": 4}}, "quantization_config: of quantised weights only fp8"),
            ({"sliding_window": 4096}, "sliding_window = 4096: which layers have it is not said"),
            ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096"),
            (
                {"layer_types": ["full_attention", "sliding_attention"]},
                "layer_types: windows of model_type = None are not known",
            ),
            ({"layer_types": ["linear_attention"] * 4}, "layer_types: linear_attention"),
            ({"head_dim": 0}, "model.head_dim = 0: Input should be greater than 0"),
            ({"head_dim": -64}, "model.head_dim = -64: Input should be greater than 0"),
            ({"num_key_value_heads": 0}, "model.num_kv_heads = 0: Input should be greater than 0"),
            ({"num_attention_heads": 24}, "hidden_size = 4096 is no multiple of num_attention_heads = 24"),
            ({"num_hidden_layers": True}, "model.num_layers = True: must be a number"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_a_model_beyond_what_is_modelled_is_refused(
        self, tmp_path: Path, changes: dict[str, Any], problem: str
    ) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA | changes))
        with pytest.raises(SpecError) as failure:
            model_from_hf_config(path)
        assert str(failure.value).startswith(f"{path}: {problem}")

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_experts": 0, "num_local_experts": None, "kv_lora_rank": None, "quantization_config": None},
            {"sliding_window": None},
            {"sliding_window": 8192},
            {"sliding_window": 4096, "use_sliding_window": False},
            {"model_type": "qwen3", "sliding_window": 4096},
            {"sliding_window": 4096, "layer_types": ["full_attention"] * 32},
            {"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 128},
        ],
        ids=lambda value: "-".join(value),
    )
    def test_a_switch_that_is_off_is_no_obstacle(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA | changes))
        model = model_from_hf_config(path)
        assert (model.num_layers, model.head_dim) == (32, 128)
        assert "bf16" in model.source

    @pytest.mark.parametrize("missing", list(LLAMA)[:4])
    def test_a_config_without_a_field(self, tmp_path: Path, missing: str) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({name: value for name, value in LLAMA.items() if name != missing}))
        with pytest.raises(SpecError, match=f"config.json: no field '{missing}'"):
            model_from_hf_config(path)

    def test_names_and_paths(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"design 'cloe' is unknown \(did you mean clo"):
            presets.load_design("cloe")
        with pytest.raises(NotFoundError, match="no such file"):
            presets.load_design(str(tmp_path / "none.toml"))
        path = tmp_path / "mine.toml"
        path.write_text('name = "mine"\ntau = 0.7\n')
        assert presets.load_design(str(path)).tau == 0.7
        path.write_text("tau = true")
        with pytest.raises(SpecError, match=r"design\.tau = True: must be a number"):
            presets.load_design(str(path))
        path.write_text("tau = ")
        with pytest.raises(SpecError, match="not TOML"):
            presets.load_design(str(path))


class TestOverrides:
    def test_any_depth(self) -> None:
        changes = parse_overrides(["machine.link.h2d_bytes_per_s=50e9", "machine.name=fast"], ["machine"])
        machine = apply(tiny_machine(), changes["machine"], "machine")
        assert (machine.link.h2d_bytes_per_s, machine.link.d2h_bytes_per_s, machine.name) == (50e9, 64.0, "fast")

    @pytest.mark.parametrize(
        ("setting", "problem"),
        [
            ("design.tau", "expected FIELD=VALUE"),
            ("tau=1", "expected FIELD=VALUE"),
            ("engine.tau=1", "expected FIELD=VALUE"),
            ("design.tao=1", "design.tao: unknown field"),
            ("design.tau.x=1", "tau has no fields"),
            ("design.tau=much", "design.tau"),
            ("design.tau=nan", "design.tau"),
            ("design.slot_budgets=Infinity", "design.slot_budgets"),
            ("=1", "expected FIELD=VALUE"),
            ("design.=1", "design.: unknown field"),
            ("design.prefetch_query=previous_step", "cache must be lru"),
        ],
    )
    def test_bad_settings(self, setting: str, problem: str) -> None:
        with pytest.raises(CloError) as failure:
            apply(Design(), parse_overrides([setting], ["design"])["design"], "design")
        assert problem in str(failure.value)
        assert "\n" not in str(failure.value)
