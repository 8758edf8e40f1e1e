"""Exploration of any field, with a budget, on workers that may die, in runs that may be cut off."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import clo_sim
from clo import presets
from clo.errors import CloError, SpecError
from clo.specs import Design
from clo_cli.explore import _as_json
from clo_cli.main import clo
from clo_sim.evaluation import METRICS, Evaluation, evaluate, from_json, key_of, question_digest, to_json
from clo_sim.explore import explore
from clo_sim.goals import LARGER_IS_BETTER, Bound, Goals
from clo_sim.record import Record
from clo_sim.scene import Scene
from clo_sim.search import Range, search
from clo_sim.variation import Task, expand, scene_with, task_at
from clo_sim.workers import MAX_DEATHS, LocalPool, Workers

CLO = presets.load_design("clo")


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A question that takes milliseconds: a small model, few steps, little memory."""
    small = clo_sim.make_scene("smollm2-135m", context_tokens=4096, batch=2, kv_memory_bytes=250e6)
    return scene_with(small, [("workload.steps", 4), ("workload.warmup_steps", 8)])


def many(count: int, level: Any = "simpy") -> list[Task]:
    """As many designs that differ."""
    return [Task(design=CLO.with_fields(tau=0.2 + 0.6 * n / count), level=level) for n in range(count)]


def numbers(evaluations: Sequence[Evaluation]) -> list[tuple[float | None, str]]:
    return [(one.tpot_s, one.problem) for one in evaluations]


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
        tasks = expand(CLO, {"workload.batch": sorted(batches), "design.cache": sorted(caches)})
        found = {(dict(task.changes)["workload.batch"], str(task.design.cache)) for task in tasks}
        assert found == set(itertools.product(batches, caches))
        assert len(tasks) == len(found)

    def test_contradictions_are_left_out_and_only_they(self) -> None:
        grid = {"design.cache": ["lru", "head_reuse"], "design.prefetch_query": ["layer_ahead", "previous_step"]}
        assert {(t.design.cache.value, t.design.prefetch_query.value) for t in expand(CLO, grid)} == {
            ("lru", "layer_ahead"),
            ("lru", "previous_step"),
            ("head_reuse", "layer_ahead"),
        }

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


def made_up(**metrics: float) -> Evaluation:
    return Evaluation(task=Task(design=CLO), metrics={**dict.fromkeys(METRICS, 1.0), **metrics})


EVALUATIONS = st.lists(
    st.builds(made_up, tpot_s=st.integers(1, 5), overlap=st.integers(1, 5), kv_device_bytes=st.integers(1, 5)),
    max_size=12,
)


class TestGoals:
    @given(EVALUATIONS, st.lists(st.sampled_from(["tpot_s", "overlap", "kv_device_bytes"]), min_size=1, unique=True))
    def test_the_front_by_its_definition(self, evaluations: list[Evaluation], objectives: list[str]) -> None:
        goals = Goals(objectives=tuple(objectives), bounds=(Bound.parse("kv_device_bytes<=4"),))
        allowed = [one for one in evaluations if one.metrics["kv_device_bytes"] <= 4]

        def costs(one: Evaluation) -> tuple[float, ...]:
            return tuple(one.metrics[name] * (-1 if name in LARGER_IS_BETTER else 1) for name in objectives)

        def beaten(one: Evaluation) -> bool:
            return any(
                costs(other) != costs(one) and all(a <= b for a, b in zip(costs(other), costs(one), strict=True))
                for other in allowed
            )

        expected = {costs(one) for one in allowed if not beaten(one)}
        front = goals.front(evaluations)
        assert {costs(one) for one in front} == expected
        assert len(front) == len(expected)
        ranked = goals.ranked(evaluations)
        assert Counter(map(id, ranked)) == Counter(map(id, allowed))
        assert {costs(one) for one in ranked[: len(front)]} == expected

    @given(st.floats(-10, 10), st.floats(-10, 10))
    def test_a_bound_is_broken_by_a_positive_excess(self, value: float, bound: float) -> None:
        one = made_up(overlap=value)
        assert (Bound("overlap", bound, True).excess(one) <= 0) == (value >= bound)
        assert (Bound("overlap", bound, False).excess(one) <= 0) == (value <= bound)

    @pytest.mark.parametrize("text", ["overlap", "overlap=0.9", "speed>=1", "overlap>=high", "overlp>=1"])
    def test_bad_bounds_are_refused(self, text: str) -> None:
        with pytest.raises(SpecError):
            Bound.parse(text)


def inline(scene: Scene) -> Any:
    return lambda tasks: [evaluate(scene, task) for task in tasks]


SPACE = {"design.tau": Range(0.3, 0.95), "design.slot_budgets": [1, 2, 3], "workload.batch": Range(1, 4)}


class TestSearch:
    def test_a_budget_as_large_as_the_space_finds_the_best_there_is(self, scene: Scene) -> None:
        grid = {"design.slot_budgets": [1, 2, 3, None], "design.prefetch_depth": [0, 1, 2], "design.cache": ["lru"]}
        tried = search(CLO, grid, 12, Goals(), inline(scene))
        assert [one.task for one in tried] == expand(CLO, grid)

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
        said = json.loads(json.dumps(_as_json(found), allow_nan=False))
        assert said["front"][0]["metrics"]["overlap"] is None
        assert said["front"][0]["metrics"]["tpot_s"] == found.best.tpot_s

    def test_without_a_machine_the_level_says_so(self, scene: Scene) -> None:
        with pytest.raises(SpecError, match="no real machine"):
            evaluate(scene, Task(design=CLO, level="machine"))


class CountingPool(LocalPool):
    """Counts how often workers had to be started."""

    starts = 0

    def start(self) -> tuple[Executor, Any]:
        self.starts += 1
        return super().start()


class DeadPool:
    """Workers that cannot live."""

    lost: tuple[type[Exception], ...] = (BrokenExecutor,)
    size, starts = 2, 0

    def start(self) -> tuple[Executor, Any]:
        self.starts += 1
        raise BrokenExecutor("killed")

    def stop(self) -> None:
        pass


class TestWorkers:
    def test_a_killed_worker_loses_nothing(self, scene: Scene) -> None:
        tasks = many(40)
        pool, found = CountingPool(scene, 2), []
        with Workers(scene, pool) as workers:
            for number, one in workers.run(tasks):
                if not found:
                    os.kill(pool.pids[0], signal.SIGKILL)
                found.append((number, one))
        assert pool.starts == 2, "the kill came too late to matter"
        assert sorted(number for number, _ in found) == list(range(len(tasks)))
        here = [evaluate(scene, task) for task in tasks]
        assert numbers([one for _, one in sorted(found, key=lambda pair: pair[0])]) == numbers(here)

    def test_workers_that_always_die_are_given_up(self, scene: Scene) -> None:
        pool = DeadPool()
        with pytest.raises(CloError, match="workers died 3 times without finishing any of 20"):
            list(Workers(scene, pool).run(many(20)))
        assert pool.starts == MAX_DEATHS

    def test_little_work_starts_no_workers(self, scene: Scene) -> None:
        pool = DeadPool()
        local = CountingPool(scene, 2)
        assert len(list(Workers(scene, local).run(many(3)))) == 3
        assert len(list(Workers(scene, pool).run(many(1)))) == 1
        assert (local.starts, pool.starts) == (0, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="Dask comes with the cluster extra")
    local = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    yield local
    local.close()


class TestCluster:
    def test_two_real_workers_of_which_one_is_killed(self, cluster: Any, scene: Scene) -> None:
        from clo_sim.workers import DaskPool

        tasks, found = many(60), []
        victim = next(iter(cluster.workers.values())).pid
        with Workers(scene, DaskPool(scene, cluster.scheduler_address)) as workers:
            for number, one in workers.run(tasks):
                if not found:
                    os.kill(victim, signal.SIGKILL)
                found.append((number, one))
        assert sorted(number for number, _ in found) == list(range(len(tasks)))
        here = [evaluate(scene, task) for task in tasks]
        assert numbers([one for _, one in sorted(found, key=lambda pair: pair[0])]) == numbers(here)

    def test_both_workers_work_and_the_command_agrees(self, cluster: Any) -> None:
        arguments = [*EXPLORE, "--vary", "tau=0.3,0.5,0.7,0.9", "--vary", "slot_budgets=1,2"]
        there = run_json(*arguments, "--cluster", cluster.scheduler_address)
        assert there == run_json(*arguments, "--workers", "1")

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "tcp://nowhere"])
    def test_no_scheduler_is_one_line(self, address: str) -> None:
        pytest.importorskip("distributed", reason="Dask comes with the cluster extra")
        command = [*COMMAND, *EXPLORE, "--cluster", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert f"--cluster {address}: " in done.stderr


class CutOffError(Exception):
    """Stands for a power cut."""


def cut_after(count: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise CutOffError

    return progress


class TestRecord:
    @pytest.mark.parametrize("budget", [None, 40])
    @settings(max_examples=4, deadline=None)
    @given(cut=st.integers(1, 39))
    def test_a_resumed_run_is_an_uninterrupted_one(
        self, scene: Scene, tmp_path_factory: pytest.TempPathFactory, budget: int | None, cut: int
    ) -> None:
        space: Any = {"design.tau": [n / 40 for n in range(40)]} if budget is None else SPACE
        question: dict[str, Any] = {"named": [], "base": CLO, "space": space, "budget": budget, "num_finalists": 2}
        path = tmp_path_factory.mktemp("record") / "record.jsonl"
        with Record(path) as record, pytest.raises(CutOffError):
            explore(scene, **question, record=record, progress=cut_after(cut))
        with Record(path) as record:
            assert len(record) == cut
            resumed = explore(scene, **question, record=record)
        whole = explore(scene, **question)
        assert resumed.recalled == cut
        assert numbers(resumed.candidates) == numbers(whole.candidates)
        assert resumed.best == whole.best
        assert resumed.choices == whole.choices

    def test_each_evaluation_is_recorded_once(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        for _ in range(2):
            with Record(path) as record:
                explore(scene, named=[CLO], base=CLO, space={"design.slot_budgets": [1, 2]}, record=record)
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]]
        assert len(keys) == len(set(keys)) > 4

    def test_another_question_takes_nothing_from_it(self, scene: Scene, tmp_path: Path) -> None:
        for seed in (1, 2):
            other = scene_with(scene, [("workload.seed", seed)])
            with Record(tmp_path / "record.jsonl") as record:
                assert explore(other, named=[CLO], base=CLO, space={}, record=record).recalled == 0

    def test_a_line_cut_off_is_done_again(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        with Record(path) as record:
            record.add("a", evaluate(scene, many(1)[0]))
            record.add("b", evaluate(scene, many(2)[1]))
        path.write_bytes(path.read_bytes()[:-7])
        with Record(path) as record:
            assert record.get("a") is not None
            assert record.get("b") is None
            record.add("c", evaluate(scene, many(3)[2]))
        with Record(path) as record:
            assert len(record) == 2

    def test_two_runs_do_not_share_one(self, tmp_path: Path) -> None:
        with Record(tmp_path / "record.jsonl"), pytest.raises(CloError, match="another run"):
            Record(tmp_path / "record.jsonl")

    @pytest.mark.parametrize("text", ["hello\n", "{}\n", '{"what": "clo evaluations", "schema_version": 9}\n', "hello"])
    def test_other_files_are_refused_and_left_alone(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "record.jsonl"
        path.write_text(text)
        with pytest.raises(CloError, match=r"record\.jsonl"):
            Record(path)
        assert path.read_text() == text

    def test_a_damaged_line_is_named(self, scene: Scene, tmp_path: Path) -> None:
        path = tmp_path / "record.jsonl"
        with Record(path):
            pass
        path.write_text(path.read_text() + '{"key": "a"}\n')
        with pytest.raises(CloError, match="line 2: not an evaluation"):
            Record(path)


COMMAND = (sys.executable, "-c", "import sys; from clo_cli.main import main; sys.argv[0] = 'clo'; main()")
EXPLORE = (
    "explore",
    "--model",
    "smollm2-135m",
    "--context",
    "4096",
    "--batch",
    "2",
    "--designs",
    "clo",
    "--steps",
    "4",
)


def run_json(*arguments: str) -> Any:
    done = CliRunner().invoke(clo, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


class TestCommand:
    def test_a_table_has_every_field_and_metric(self, tmp_path: Path) -> None:
        path = tmp_path / "all.parquet"
        vary = ["--vary", "machine=h200,l40s", "--vary", "workload.batch=1,2", "--vary", "slot_budgets=1,none"]
        found = run_json(*EXPLORE, *vary, "--parquet", str(path))
        table = pq.read_table(path)
        rows = [row for row in table.to_pylist() if row["role"] == "candidate"]
        asked = itertools.product(["h200", "l40s"], [1, 2], [1.0, None])
        assert {(r["machine.name"], r["workload.batch"], r["design.slot_budgets"]) for r in rows} == set(asked)
        assert len(rows) == 8
        columns = set(table.column_names)
        assert {f"design.{name}" for name in Design.model_fields} - {"design.name", "design.description"} <= columns
        assert {*METRICS, "machine.link.h2d_bytes_per_s", "executor", "assumptions", "model.num_layers"} <= columns
        rates = {r["machine.name"]: r["machine.link.h2d_bytes_per_s"] for r in rows}
        assert rates == {name: presets.load_machine(name).link.h2d_bytes_per_s for name in ("h200", "l40s")}
        assert found["num_candidates"] == 8
        assert found["front"][0]["metrics"]["tpot_s"] == found["best"]["tpot_s"]

    def test_models_with_experts_and_windows_have_columns_beside_others(self, tmp_path: Path) -> None:
        path = tmp_path / "models.parquet"
        names = ("qwen3-30b-a3b", "gemma-3-27b", "smollm2-135m")
        run_json(*EXPLORE, "--vary", f"model={','.join(names)}", "--parquet", str(path))
        rows = {row["model.name"]: row for row in pq.read_table(path).to_pylist() if row["role"] == "candidate"}
        for name in names:
            model, row = presets.load_model(name), rows[name]
            assert tuple(row["model.windowed_layers"]) == model.windowed_layers
            assert row["model.window_tokens"] == model.window_tokens
            assert row["model.experts.num_experts"] == (model.experts and model.experts.num_experts)

    def test_a_search_reports_its_front(self, tmp_path: Path) -> None:
        vary = ["--vary", "tau=0.4..0.9", "--vary", "workload.batch=1..8:log", "--evaluations", "20"]
        goals = ["--objective", "tokens_per_s", "--objective", "kv_device_bytes", "--require", "overlap>=0.6"]
        found = run_json(*EXPLORE, *vary, *goals, "--record", str(tmp_path / "record.jsonl"))
        assert found["num_candidates"] == 20
        assert all(one["metrics"]["overlap"] >= 0.6 for one in found["front"])
        again = run_json(*EXPLORE, *vary, *goals, "--record", str(tmp_path / "record.jsonl"))
        assert again["num_from_record"] > 20
        assert {**again, "num_from_record": 0} == {**found, "num_from_record": 0}

    def test_ctrl_c_leaves_what_was_done_and_a_record_to_go_on(self, tmp_path: Path) -> None:
        record, table = tmp_path / "record.jsonl", tmp_path / "partial.parquet"
        vary = ["--vary", "tau=" + ",".join(str(n / 400) for n in range(400)), "--record", str(record)]
        command = [*COMMAND, *EXPLORE, *vary, "--parquet", str(table), "--workers", "2"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 60
        while not record.exists() or record.read_bytes().count(b"\n") < 10:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # as a terminal does: to the command and to its workers
        os.killpg(process.pid, signal.SIGINT)
        _, problem = process.communicate(timeout=60)
        assert process.returncode == 130, problem
        assert "Traceback" not in problem
        rows = pq.read_table(table).to_pylist()
        done = [json.loads(line) for line in record.read_text().splitlines()[1:]]
        told = {row["design.tau"] for row in rows if row["role"] == "candidate"}
        kept = {line["design"]["tau"] for line in done if line["level"] == "clock"}
        # an evaluation is recorded before it is counted: the interrupt may come in between
        assert told <= kept
        assert len(kept - told) <= 1
        assert 9 <= len(rows) <= len(done) <= len(rows) + 1 < 400

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--vary", "machine.lnk=1"], "--vary machine.lnk=1: expected FIELD"),
            (["--vary", "workload.batch=0"], "workload.batch = 0"),
            (["--vary", "machine=h300"], "machine 'h300' is unknown"),
            (["--vary", "tau=0.1..0.9"], "design.tau=0.1..0.9: a range is searched with a budget"),
            (["--vary", "tau=0.9..0.1", "--evaluations", "4"], "--vary tau=0.9..0.1: range"),
            (["--vary", "tau=a..b", "--evaluations", "4"], "--vary tau=a..b: expected FIELD=LOW..HIGH"),
            (["--vary", "tau=0.5..9", "--evaluations", "4"], "design.tau = 9"),
            (
                ["--vary", "machine=l40s", "--set", "machine.reserve_bytes=1"],
                "vary machine.reserve_bytes too, and drop --set machine.*",
            ),
            (["--vary", "machine=l40s", "--profile", "h100"], "drop --profile"),
            (["--objective", "speed"], "--objective: metric 'speed' is unknown"),
            (["--require", "overlap"], "--require: 'overlap': expected METRIC"),
            (["--require", "overlap>=nan"], "--require: 'overlap>=nan': nan is no number"),
            (["--require", "overlap>=x"], "--require: 'overlap>=x': x is no number"),
            (["--workers", "999999"], "--workers = 999999: must be at most"),
            (["--require", "tpot_s<=1e-9", "--no-sweep"], "none of the 1 designs that run keeps tpot_s<=1e-09"),
            (["--workers", "2", "--cluster", "tcp://a"], "--workers and --cluster"),
            (["--record", "/proc/none"], "/proc/none: cannot be written"),
        ],
    )
    def test_bad_input_is_refused_in_a_line(self, arguments: list[str], said: str) -> None:
        with pytest.raises(CloError) as caught:
            CliRunner().invoke(clo, [*EXPLORE, *arguments], catch_exceptions=False)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
