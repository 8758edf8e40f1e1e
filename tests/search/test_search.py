"""A budget of evaluations: spent once, steered by goals, ended by a simulator or a machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from questions import CLO, SPACE, inline

import clo_sim
from clo.errors import SpecError
from clo.specs import Design
from clo_cli.explore import _as_json
from clo_sim.evaluation import METRICS, Evaluation, evaluate
from clo_sim.explore import explore
from clo_sim.goals import Bound, Goals
from clo_sim.scene import Scene
from clo_sim.search import Range, search
from clo_sim.variation import Task, expand


class TestSearch:
    def test_a_budget_as_large_as_the_space_finds_the_best_there_is(self, scene: Scene) -> None:
        grid = {"design.slot_budgets": [1, 2, 3, None], "design.prefetch_depth": [0, 1, 2], "design.cache": ["lru"]}
        tried = search(CLO, grid, 12, Goals(), inline(scene))
        assert [one.task for one in tried] == list(expand(CLO, grid).tasks)

    def test_a_small_budget_of_a_large_grid_is_kept_and_not_spent_twice(self, scene: Scene) -> None:
        grid = {"design.tau": [n / 50 for n in range(50)], "design.slot_budgets": [1, 2, 3, None]}
        tried = search(CLO, grid, 40, Goals(), inline(scene))
        assert len({one.task for one in tried}) == len(tried) == 40

    def test_nearly_exhausted_spaces_end(self, scene: Scene) -> None:
        # 16 points of which 4 differ: previous_step needs an LRU cache, tau is the same
        space = {"design.cache": ["lru", "none"] * 4, "workload.batch": Range(1, 2)}
        tried = search(CLO, space, 40, Goals(), inline(scene))
        assert len({one.task for one in tried}) == len(tried) == 4

    def test_it_learns(self) -> None:
        """Against as many random designs: the optimiser comes nearer to a known optimum, on the median of seeds."""

        def distance(tasks: Sequence[Task]) -> list[Evaluation]:
            return [
                Evaluation(
                    task=task,
                    metrics={**dict.fromkeys(METRICS, 1.0), "tpot_s": 1 + (task.design.tau - 0.61) ** 2},
                )
                for task in tasks
            ]

        space = {"design.tau": Range(-1.0, 2.0), "design.slot_budgets": [1, 2, 3]}
        misses = []
        for seed in range(5):
            tried = search(CLO, space, 64, Goals(), distance, seed=seed)
            misses.append(min(abs(one.design.tau - 0.61) for one in tried))
        # of 64 draws from a range of 3 the nearest is 3 / 130 away on average
        assert sorted(misses)[2] < 3 / 130 / 2

    def test_bounds_steer_it(self) -> None:
        """Faster with every bit of tau less, but overlap must stay: the search gathers just above the bound."""

        def trade(tasks: Sequence[Task]) -> list[Evaluation]:
            metrics = dict.fromkeys(METRICS, 1.0)
            return [
                Evaluation(task=task, metrics={**metrics, "tpot_s": 2 + task.design.tau, "overlap": task.design.tau})
                for task in tasks
            ]

        goals = Goals(bounds=(Bound.parse("overlap>=0.5"),))
        tried = search(CLO, {"design.tau": Range(0.0, 1.0)}, 80, goals, trade)
        best = goals.ranked(tried)[0]
        assert 0.5 <= best.design.tau < 0.53

    def test_the_same_seed_asks_for_the_same_designs(self, scene: Scene) -> None:
        first, again, other = (
            [one.task for one in search(CLO, SPACE, 24, Goals(), inline(scene), seed=seed)] for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other

    def test_two_objectives(self, scene: Scene) -> None:
        goals = Goals(objectives=("tokens_per_s", "kv_device_bytes"))
        tried = search(CLO, SPACE, 40, goals, inline(scene))
        assert len(goals.front(tried)) > 1

    @pytest.mark.parametrize(
        ("low", "high", "log"), [(1, 1, False), (2, 1, False), (0, 1, True), (float("nan"), 1, False)]
    )
    def test_bad_ranges_are_refused(self, low: float, high: float, log: bool) -> None:
        with pytest.raises(SpecError, match="range"):
            Range(low, high, log)

    def test_a_range_needs_a_budget(self, scene: Scene) -> None:
        with pytest.raises(SpecError, match=r"design\.tau=0\.3\.\.0\.95: a range"):
            explore(scene, named=[], base=CLO, space=SPACE)

    def test_finalists_keep_bounds_on_the_simulator_too(self, scene: Scene) -> None:
        goals = Goals(objectives=("tpot_s", "kv_device_bytes"), bounds=(Bound.parse("overlap>=0.7"),))
        found = explore(scene, named=[CLO], base=CLO, space=SPACE, budget=24, num_finalists=4, goals=goals)
        assert len(found.candidates) == 24
        assert {one.task.level for one in found.finalists} == {"simpy"}
        assert all(one.metrics["overlap"] >= 0.7 for one in found.front)
        assert found.best.tpot_s == min(one.metrics["tpot_s"] for one in (*found.named, *found.finalists))
        chosen = {(one.design.tau, one.task.changes) for one in found.finalists}
        assert chosen <= {(one.design.tau, one.task.changes) for one in found.candidates if goals.allows(one)}

    def test_a_machine_has_the_last_word(self, scene: Scene) -> None:
        """A made-up machine on which the finalist that the simulator likes least is the fastest."""
        order: list[float] = []

        def run(its_scene: Scene, design: Design) -> Any:
            result = clo_sim.simulate(its_scene, design)
            order.append(result.tpot_s)
            return result.model_copy(update={"executor": "machine", "tpot_s": 1.0 / result.tpot_s})

        grid = {"design.slot_budgets": [1, 2, 3]}
        found = explore(scene, named=[], base=CLO, space=grid, num_finalists=3, measure=run)
        assert len(found.measured) == 3
        assert found.best.executor == "machine"
        assert found.best.tpot_s == 1.0 / max(order)

    def test_what_a_machine_cannot_say_is_null_in_json(self, scene: Scene) -> None:
        def run(its_scene: Scene, design: Design) -> Any:
            return clo_sim.simulate(its_scene, design).model_copy(update={"executor": "machine", "overlap": None})

        found = explore(scene, named=[], base=CLO, space={"design.slot_budgets": [1]}, num_finalists=1, measure=run)
        said = json.loads(json.dumps(_as_json(found, scene, CLO), allow_nan=False))
        assert said["front"][0]["metrics"]["overlap"] is None
        assert said["front"][0]["metrics"]["tpot_s"] == found.best.tpot_s

    def test_without_a_machine_the_level_says_so(self, scene: Scene) -> None:
        with pytest.raises(SpecError, match="no real machine"):
            evaluate(scene, Task(design=CLO, level="machine"))
