"""Scenes from Python: what is refused, and that every preset and short context runs."""

from __future__ import annotations

from typing import Any

import pytest
from scenes import PLANNED, SOURCE, scene_of

import clo_sim
from clo import presets
from clo.errors import SpecError
from clo.specs import Workload


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


class TestRuns:
    @pytest.mark.parametrize("machine", presets.names("machines"))
    @pytest.mark.parametrize("model", ["llama-3-8b", "qwen2.5-14b"])
    def test_every_preset_loads_and_runs(self, machine: str, model: str) -> None:
        workload = Workload(context_tokens=16384, batch=1, steps=2)
        result = clo_sim.simulate(scene_of(model, machine, workload=workload), "clo")
        assert 0 < result.tpot_s < 1

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
