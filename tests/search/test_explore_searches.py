"""`clo explore` over many fields: tables, fronts, interrupts, refusals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import CLO as COMMAND
from questions import EXPLORE, explored

from clo import presets
from clo.errors import CloError
from clo.specs import Design
from clo_cli.main import clo
from clo_sim.evaluation import METRICS


class TestCommand:
    def test_a_table_has_every_field_and_metric(self, tmp_path: Path) -> None:
        path = tmp_path / "all.parquet"
        vary = ["--vary", "machine=h200,l40s", "--vary", "workload.batch=1,2", "--vary", "slot_budgets=1,none"]
        found = explored(*vary, "--parquet", str(path))
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
        names = ("qwen3-30b-a3b", "gemma-3-27b", "smollm2-135m", "qwen3.5-35b-a3b")
        explored("--vary", f"model={','.join(names)}", "--parquet", str(path))
        rows = {row["model.name"]: row for row in pq.read_table(path).to_pylist() if row["role"] == "candidate"}
        for name in names:
            model, row = presets.load_model(name), rows[name]
            assert tuple(row["model.windowed_layers"]) == model.windowed_layers
            assert row["model.window_tokens"] == model.window_tokens
            assert row["model.experts.num_experts"] == (model.experts and model.experts.num_experts)
            assert row["model.linear.key_dim"] == (model.linear and model.linear.key_dim)

    def test_a_search_reports_its_front(self, tmp_path: Path) -> None:
        vary = ["--vary", "tau=0.4..0.9", "--vary", "workload.batch=1..8:log", "--evaluations", "20"]
        goals = ["--objective", "tokens_per_s", "--objective", "kv_device_bytes", "--require", "overlap>=0.6"]
        found = explored(*vary, *goals, "--record", str(tmp_path / "record.jsonl"))
        assert found["num_candidates"] == 20
        assert all(one["metrics"]["overlap"] >= 0.6 for one in found["front"])
        again = explored(*vary, *goals, "--record", str(tmp_path / "record.jsonl"))
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
