"""Bad input is an error that names the field, the value and the rule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scenes import PLANNED
from tiny import tiny_machine, tiny_model

from clo import presets
from clo.errors import CloError, NotFoundError, SpecError
from clo.plan import make_plan
from clo.specs import Design, MachineSpec, ModelSpec, Workload
from clo.specs.overrides import apply, parse_overrides

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.sampled_from([-1e300, -1.0, 0.0, 0.05, 0.5, 1.5, 1e9, math.inf, -math.inf, math.nan])
    | st.sampled_from(["", "fit", "lru", "exact", "graph", "gpu", "minimum", "\n"])
    | st.lists(st.integers(), max_size=1)
)


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


class TestOverrides:
    def test_any_depth(self) -> None:
        changes = parse_overrides(["machine.link.h2d_bytes_per_s=50e9", "machine.name=fast"], ["machine"])
        machine = apply(tiny_machine(), changes["machine"], "machine")
        assert (machine.link.h2d_bytes_per_s, machine.link.d2h_bytes_per_s, machine.name) == (50e9, 64.0, "fast")

    @pytest.mark.parametrize(
        ("setting", "problem"),
        [
            ("design.tau", "expected FIELD=VALUE"),
            ("tau=1", "did you mean design.tau=1?"),
            ("unheard=1", "expected FIELD=VALUE"),
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


class TestNames:
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
