"""Any field varied by its name, in grids."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from questions import CLO

from clo import presets
from clo.errors import SpecError
from clo_sim.evaluation import evaluate
from clo_sim.explore import check_space
from clo_sim.scene import Scene
from clo_sim.variation import expand, scene_with, task_at, vary


class TestVariation:
    def test_any_field_by_its_dotted_name(self, scene: Scene) -> None:
        changes = (
            ("workload.batch", 3),
            ("machine.link.h2d_bytes_per_s", 1e9),
            ("model.num_layers", 12),
            ("profile.read_back.seconds", 0.5),
        )
        varied = scene_with(scene, changes)
        assert varied.workload == scene.workload.with_fields(batch=3)
        assert varied.machine.link.h2d_bytes_per_s == 1e9
        assert varied.machine.gpu == scene.machine.gpu
        assert varied.model.num_layers == 12
        assert (varied.profile.read_back.seconds, varied.profile.read_back.source) == (0.5, "assumed")
        assert scene_with(scene, ()) == scene

    def test_a_machine_by_name_brings_its_costs(self, scene: Scene) -> None:
        varied = scene_with(scene, [("machine", "l40s"), ("machine.reserve_bytes", 1.0)])
        assert varied.machine == presets.load_machine("l40s").with_fields(reserve_bytes=1.0)
        assert varied.profile == presets.load_named_profile("l40s")

    @given(st.sets(st.sampled_from([1, 2, 4]), min_size=1), st.sets(st.sampled_from(["lru", "none"]), min_size=1))
    def test_a_grid_is_the_product(self, batches: set[int], caches: set[str]) -> None:
        tasks = expand(CLO, {"workload.batch": sorted(batches), "design.cache": sorted(caches)}).tasks
        found = {(dict(task.changes)["workload.batch"], str(task.design.cache)) for task in tasks}
        assert found == set(itertools.product(batches, caches))
        assert len(tasks) == len(found)

    def test_contradictions_are_left_out_and_only_they(self) -> None:
        grid = {"design.cache": ["lru", "head_reuse"], "design.prefetch_query": ["layer_ahead", "previous_step"]}
        assert {(t.design.cache.value, t.design.prefetch_query.value) for t in expand(CLO, grid).tasks} == {
            ("lru", "layer_ahead"),
            ("lru", "previous_step"),
            ("head_reuse", "layer_ahead"),
        }
        (reason, count), *others = expand(CLO, grid).contradictions.items()
        assert "prefetch_query = previous_step" in reason
        assert (count, others) == (1, [])

    def test_names_say_what_differs_however_it_was_written(self) -> None:
        given = {"slot_budgets": "none", "tau": str(CLO.tau), "page_size": "32"}
        assert vary(CLO.with_fields(slot_budgets=None), given).name == f"{CLO.name} page_size=32"

    def test_values_are_held_against_the_base_and_what_else_is_varied(self, scene: Scene) -> None:
        small_pages = {"design.page_size": [2, 16]}
        check_space(scene, small_pages, CLO.with_fields(num_sink_tokens=0))
        check_space(scene, {**small_pages, "design.num_sink_tokens": [0]}, CLO)
        check_space(scene, {"design.page_size": [32], "design.num_sink_tokens": [32]}, CLO)
        with pytest.raises(SpecError, match="num_sink_tokens = 4 must fit the first page of 2 tokens"):
            check_space(scene, small_pages, CLO)
        with pytest.raises(SpecError, match=r"design\.page_size = 0"):
            check_space(scene, {"design.page_size": [0], "design.num_sink_tokens": [0]}, CLO)

    @pytest.mark.parametrize(
        ("field", "slow", "fast"),
        [
            ("machine.link.h2d_bytes_per_s", 1e8, 1e11),
            ("workload.batch", 2, 1),
            ("model.num_layers", 30, 10),
            ("profile.read_back.seconds", 0.1, 0.0),
        ],
    )
    def test_time_moves_with_its_cause(self, scene: Scene, field: str, slow: float, fast: float) -> None:
        times = [
            evaluate(scene, task_at(CLO, {field: value, "design.slot_budgets": 1})).tpot_s for value in (slow, fast)
        ]
        assert times[0] is not None
        assert times[1] is not None
        assert times[0] > times[1]

    def test_what_does_not_fit_is_a_problem_not_an_error(self, scene: Scene) -> None:
        one = evaluate(scene, task_at(CLO, {"workload.context_tokens": 10**6}))
        assert "workload.context_tokens" in one.problem
        assert not one.runs
        assert one.tpot_s is None
