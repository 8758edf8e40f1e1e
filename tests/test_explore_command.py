"""`clo explore`: what it prints and writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import SMALL, run, simulate

import clo_plots
from clo_cli.main import clo
from clo_plots import DesignPoint, plot_pareto
from clo_plots.sweep_table import load_points


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("explore")
    vary = ["--vary", "design.slot_budgets=1,2,none", "--vary", "design.sync=events,graph"]
    text = run("explore", *SMALL, "--designs", "clo,resident,staged", *vary, "--out", out, "--json")
    return out, json.loads(text)


class TestExplore:
    def test_the_best_is_the_fastest_of_all(self, swept: tuple[Path, dict[str, Any]]) -> None:
        found = swept[1]
        times = [result["tpot_s"] for result in (*found["named"], *found["finalists"])]
        assert found["best"]["tpot_s"] == min(times)
        assert found["num_candidates"] == 6

    def test_files_agree_with_what_was_printed(self, swept: tuple[Path, dict[str, Any]]) -> None:
        out, found = swept
        rows = pq.read_table(out / "sweep.parquet").to_pylist()
        by_role = Counter(row["role"] for row in rows)
        assert by_role["candidate"] == 6
        assert by_role["named"] == len(found["named"]) + len(found["not_run"])
        assert by_role["finalist"] == len(found["finalists"])
        assert json.loads((out / "best.json").read_text())["tpot_s"] == found["best"]["tpot_s"]
        assert {path.name for path in out.iterdir()} >= {"pareto.png", "stalls.png", "timeline.png", "timeline.json"}
        assert not [path for path in out.iterdir() if path.name.startswith(".")]

    def test_no_design_is_drawn_twice(
        self, swept: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[list[DesignPoint]] = []
        monkeypatch.setattr(
            clo_plots, "plot_pareto", lambda points, **_: drawn.append(points) or plot_pareto(points, **_)
        )
        run("explore", *SMALL, "--designs", "resident", "--vary", "design.tau=0.7,0.8,0.9", "--out", tmp_path)
        for points in (*drawn, load_points(swept[0] / "sweep.parquet")):
            others = [point for point in points if not point.named]
            assert len({point.name for point in others}) == len(others)
            assert any(point.finalist for point in others)

    def test_without_a_sweep_there_is_only_what_was_named(self) -> None:
        found = json.loads(run("explore", *SMALL, "--json", "--designs", "clo,resolve", "--no-sweep"))
        assert [result["design"]["name"] for result in found["named"]] == ["clo", "resolve"]
        assert (found["num_candidates"], found["finalists"], found["choices"], found["not_run"]) == (0, [], None, {})
        assert found["best"] in found["named"]
        # the same question as `clo simulate` asks, the same answer
        assert found["named"][1] == simulate("--design", "resolve")

    def test_what_does_not_fit_is_named(self) -> None:
        text = run("explore", "--designs", "clo,resident", "--no-sweep", "--steps", "4")
        assert "resident does not run" in text
        assert "275 GB" in text
        assert text.index("Roofline") < text.index("Designs with the same device memory")

    def test_what_a_setting_contradicts_is_named(self) -> None:
        arguments = ["explore", *SMALL, "--no-sweep", "--set", "design.page_coding=int8"]
        done = CliRunner().invoke(clo, arguments, catch_exceptions=False)
        told = [line for line in done.stderr.splitlines() if "left out" in line]
        assert [line.split()[1] for line in told] == ["resident", "streamed"]
        assert all("page_coding must be none" in line for line in told)

    def test_the_winner_is_named_with_what_it_was_chosen_for(self) -> None:
        vary = ["--vary", "workload.batch=1,2", "--objective", "tokens_per_s", "--steps", "4", "--designs", "clo"]
        found = json.loads(run("explore", "--batch", "1", *vary, "--json"))
        text = " ".join(run("explore", "--batch", "1", *vary).split())
        assert f"ms, tokens/s {found['front'][0]['metrics']['tokens_per_s']:.4g} " in text
        assert "in the question as given, nothing varied, simulated" in text

    def test_one_design_has_its_own_share_of_measured_costs(self) -> None:
        text = run("explore", "--batch", "1", "--no-sweep", "--designs", "clo", "--steps", "4")
        assert "of its busy time" in " ".join(text.split())

    def test_no_empty_table_where_no_named_design_runs(self) -> None:
        vary = ["--vary", "machine.tensor_parallel=2,4", "--batch", "1", "--context", "8192", "--steps", "4"]
        text = run("explore", "--model", "llama-3-70b", *vary)
        assert "do not run" in text
        assert "roofline ┃ stalls on" not in text

    def test_a_winner_that_answers_differently_is_no_winner_by_time_alone(self) -> None:
        vary = [*SMALL, "--designs", "clo", "--vary", "design.budget_fraction=0.02,0.1"]
        found = json.loads(run("explore", *vary, "--json"))
        text = " ".join(run("explore", *vary).split())
        assert found["answers_differ_by"] == ["budget_fraction"]
        assert "its answers are not those of clo (budget_fraction): time alone does not decide" in text

    def test_a_winner_on_another_model_answers_differently(self) -> None:
        vary = [*SMALL, "--designs", "clo", "--vary", "model.kv_bytes_per_value=1,2"]
        found = json.loads(run("explore", *vary, "--json"))
        text = " ".join(run("explore", *vary).split())
        assert found["best_changes"] == {"model.kv_bytes_per_value": 1}
        assert found["answers_differ_by"] == ["model.kv_bytes_per_value"]
        assert "its answers are not those of clo (model.kv_bytes_per_value)" in text
        given = json.loads(run("explore", *vary[:-1], "model.kv_bytes_per_value=2", "--json"))
        assert given["answers_differ_by"] == []

    def test_nothing_differs_from_a_base_that_was_not_asked_for(self) -> None:
        found = json.loads(run("explore", *SMALL, "--designs", "resolve", "--no-sweep", "--json"))
        assert found["answers_differ_by"] == []

    def test_a_question_that_the_trace_cannot_answer_is_refused(self) -> None:
        question = ["explore", *SMALL, "--steps", "5000"]
        for arguments in (question, [*question, "--no-sweep", "--designs", "clo,resolve"]):
            done = CliRunner().invoke(clo, arguments)
            assert done.exit_code == 1
            assert "5000" in str(done.exception)
            assert "recorded steps" in str(done.exception)
        found = json.loads(run(*question, "--no-sweep", "--designs", "streamed", "--json"))
        assert found["best"]["design"]["name"] == "streamed"
        for designs in ("clo,resident-sparse", "resident-sparse,clo"):
            found = json.loads(run(*question, "--no-sweep", "--designs", designs, "--json"))
            assert found["best"]["design"]["name"] == "resident-sparse"
            assert "5000" in found["not_run"]["clo"]
        found = json.loads(run(*question, "--designs", "clo", "--vary", "design.cache=resident,lru", "--json"))
        assert found["best"]["design"]["cache"] == "resident"
        partly = run(*question, "--designs", "clo", "--vary", "workload.steps=4,5000", "--json")
        assert json.loads(partly)["best_changes"] == {"workload.steps": 4}

    def test_a_sweep_of_contradictions_is_refused_before_any_work(self) -> None:
        vary = ["--vary", "design.page_size=2", "--vary", "design.num_sink_tokens=4,8"]
        done = CliRunner().invoke(clo, ["explore", *SMALL, *vary])
        assert done.exit_code == 1
        for sinks in (4, 8):
            assert f"num_sink_tokens = {sinks} must fit the first page of 2 tokens" in str(done.exception)

    def test_one_sequence_stays_on_the_gpu(self) -> None:
        found = json.loads(run("explore", "--batch", "1", "--no-sweep", "--steps", "8", "--json"))
        assert found["best"]["design"]["cache"] == "resident"

    def test_sixteen_sequences_are_offloaded(self) -> None:
        found = json.loads(run("explore", "--no-sweep", "--steps", "8", "--json"))
        assert found["best"]["design"]["cache"] != "resident"
        assert set(found["not_run"]) == {"resident", "resident-sparse"}
