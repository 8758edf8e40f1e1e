"""One evaluation: what it says, its key, its line in a file."""

from __future__ import annotations

import json

import pytest
from questions import CLO, many

import clo_sim
from clo import presets
from clo_sim.evaluation import METRICS, evaluate, from_json, key_of, question_digest, to_json
from clo_sim.scene import Scene
from clo_sim.variation import Task, scene_with, task_at


class TestEvaluation:
    @pytest.mark.parametrize("name", ["clo", "lru-cpu", "staged", "resident", "streamed"])
    def test_the_clock_reports_what_its_result_says(self, scene: Scene, name: str) -> None:
        roomy = scene_with(clo_sim.make_scene("smollm2-135m", context_tokens=4096, batch=2), [("workload.steps", 4)])
        design = presets.load_design(name)
        result = clo_sim.simulate(roomy, design, executor="clock")
        one = evaluate(roomy, Task(design=design))
        assert one.metrics == pytest.approx({metric: getattr(result, metric) for metric in METRICS}, rel=1e-12)
        assert one.assumptions == result.assumptions

    def test_keys_differ_where_results_may(self, scene: Scene) -> None:
        other = scene_with(scene, [("workload.seed", 7)])
        tasks = [*many(3), *many(3, "clock"), task_at(CLO, {"workload.batch": 1})]
        keys = [key_of(question_digest(one), task) for one in (scene, other) for task in tasks]
        assert len(set(keys)) == len(keys)
        renamed = Task(design=tasks[0].design.with_fields(name="other"), level="simpy")
        assert key_of(question_digest(scene), renamed) == keys[0]

    def test_what_is_written_is_read_back(self, scene: Scene) -> None:
        for task in (*many(1), *many(1, "clock"), task_at(CLO, {"workload.context_tokens": 10**6})):
            one = evaluate(scene, task)
            assert from_json(json.loads(json.dumps(to_json(one)))) == one
