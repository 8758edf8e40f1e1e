"""Calibrating, validating, running and exploring this machine: structure only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from clo.engine.measure import MachineRun
from clo.engine.run import result_of
from clo.errors import CloError, ProfileError, SpecError
from clo.operation_costs import (
    BenchmarkRow,
    OperationProfile,
    feature_values,
    load_operation_profile,
    price_key,
)
from clo.presets import load_model
from clo.results import Result, load_result
from clo.schedule import Lane, record_step
from clo.schedule.ops import price_name
from clo.timeline import load_chrome_trace
from clo_calibration.calibrate import calibrate, network_of
from clo_calibration.comparison import price_run
from clo_calibration.host_benchmarks import Benchmark
from clo_calibration.probes import (
    CPU_GRID,
    Grid,
    Probe,
    local_design,
)
from clo_calibration.run_files import load_benchmarks, save_benchmarks
from clo_calibration.validate import point_of, validate
from clo_cli.calibration_tables import print_calibration
from clo_cli.main import clo
from clo_cli.real_machine import measure_here
from clo_sim import make_scene, simulate
from clo_sim.intervals import predict
from clo_sim.serving.prefill import prefill_prices
from tests.engine.calibration.calibrated import BATCH, CONTEXT, SHAPE, SIZE


class TestEndToEnd:
    def test_calibrate_goes_on_where_it_stopped_and_validate_reads_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The whole way on a model of two layers: structure only."""
        grid = Grid(fitted=((160, 1, 0.2),), held_out=((200, 2, 0.25),), baseline=CPU_GRID.baseline)
        monkeypatch.setattr("clo_calibration.probes.CPU_GRID", grid)
        shape, samples = SHAPE.with_fields(num_layers=3), tmp_path / "samples"
        chosen = ("resident", "resolve", "clo-v2")

        class StopError(Exception):
            pass

        def stop(phase: str, done: int, _total: int) -> None:
            if phase == "decode steps" and done == 4:
                raise StopError

        with pytest.raises(StopError):
            calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1, progress=stop)
        kept = {path: path.stat().st_mtime_ns for path in (*samples.glob("*.npz"), samples / "microbenchmarks.json")}
        assert len(kept) == 5
        found = calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1)
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
        calibrate(shape, samples=samples, name="t", designs=chosen, steps=2, rounds=1, again=True)
        assert all(path.stat().st_mtime_ns > when for path, when in kept.items())
        assert all(cost.source == "measured" for cost in found.operations.values())
        path = tmp_path / "t.json"
        path.write_text(found.model_dump_json())
        assert load_operation_profile(path) == found

        step = tmp_path / "step.json"
        judged = validate(
            found, samples=tmp_path / "other", designs=chosen, steps=2, rounds=2, timeline=step, any_machine=False
        )
        assert {point.fitted for point in judged.points} == {True, False}
        assert [point.differences for point in judged.points] == [()] * len(judged.points)
        assert {"tpot_error_median", "regret", "interval_coverage"} <= judged.summary().keys()
        assert [timeline.title.endswith("(simulated)") for timeline in load_chrome_trace(step)] == [False, True]

    @pytest.mark.parametrize("text", ["[{}]", "{", "[3]"])
    def test_microbenchmarks_that_are_none_are_named(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "microbenchmarks.json"
        save_benchmarks(path, [Benchmark("copy", {"threads": 2.0}, "bytes", 3.0, (0.1, 0.2))])
        assert load_benchmarks(path) == [Benchmark("copy", {"threads": 2.0}, "bytes", 3.0, (0.1, 0.2))]
        path.write_text(text)
        with pytest.raises(CloError, match=r"microbenchmarks\.json: no"):
            load_benchmarks(path)

    @pytest.mark.parametrize(
        ("apart", "spreads", "quiet"),
        [(0.03, (0.02, 0.04, 0.5), True), (0.2, (0.02,), False), (0.0, (0.01, 0.2, 0.3), False), (0.0, (), True)],
    )
    def test_something_else_on_the_machine_is_noticed_from_the_spread(
        self, profile: OperationProfile, capsys: pytest.CaptureFixture[str], apart: float, spreads: Any, quiet: bool
    ) -> None:
        rows = tuple(
            BenchmarkRow(name="copy", parameters={}, unit="bytes", per_second=1.0, spread=spread, samples=9)
            for spread in spreads
        )
        print_calibration(profile.model_copy(update={"drift": apart, "benchmarks": rows}))
        said = capsys.readouterr().out
        assert ("kept this machine busy" in said) is not quiet
        assert ("not repeated often enough" in said) is not bool(apart)

    def test_a_profile_of_another_machine_is_refused(self, profile: OperationProfile, tmp_path: Path) -> None:
        foreign = profile.model_copy(update={"fingerprint": profile.fingerprint | {"processor": "abacus"}})
        with pytest.raises(CloError, match=r"is of another machine .*abacus.*--any-machine"):
            validate(foreign, samples=tmp_path)

    def test_a_model_that_fits_no_memory_is_refused(self) -> None:
        with pytest.raises(SpecError, match=r"in single precision.*lower model\.num_layers"):
            network_of(load_model("llama-3-70b"), torch.device("cpu"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["calibrate", "--layers", "0"], "model.num_layers = 0"),
            (["calibrate", "--layers", "100"], "--layers 100: smollm2-135m has 30"),
            (["calibrate", "--rounds", "0"], "0 is not in the range"),
            (["calibrate", "--figure", "fits.txt"], "fits.txt: a figure's suffix must be one of"),
            (["calibrate", "--designs", "nosuch"], "--designs nosuch"),
            (["calibrate", "--layers", "2"], "model.num_layers = 2: designs keep 2 of them dense"),
            (
                ["calibrate", "--model", "deepseek-v3.2", "--designs", "resident"],
                "--designs resident: choose from resident-sparse, staged",
            ),
            (["validate", "--profile", "nosuch.json"], "nosuch.json: No such file"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        with pytest.raises((CloError, click.BadParameter), match=message.replace(".", r"\.")):
            CliRunner().invoke(
                clo, [*arguments, "--out", str(tmp_path / "p.json")], catch_exceptions=False, standalone_mode=False
            )

    @pytest.mark.parametrize("command", ["calibrate", "validate"])
    def test_who_interrupts_is_told_where_the_samples_are(
        self, command: str, profile: OperationProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(f"clo_calibration.{command}.{command}", interrupt)
        path = tmp_path / "here.json"
        path.write_text(profile.model_dump_json())
        where = (
            ["--out", str(path)] if command == "calibrate" else ["--profile", str(path), "--out", str(tmp_path / "v")]
        )
        done = CliRunner().invoke(clo, [command, *where])
        samples = path.with_suffix(".samples") if command == "calibrate" else tmp_path / "v" / "samples"
        assert f"what was measured is in {samples}: the same command goes on from there" in done.stderr

    def test_a_profile_of_rates_is_no_profile_of_timed_operations(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text(json.dumps({"name": "h200"}))
        with pytest.raises(ProfileError, match="not a profile of timed operations"):
            load_operation_profile(path)

    def test_point_of_reports_both_worlds(
        self, runs: dict[str, tuple[MachineRun, MachineRun]], profile: OperationProfile
    ) -> None:
        probe = Probe(design=local_design("clo", SIZE, SHAPE), size=SIZE, alone=False, fitted=False, steps=3)
        found = point_of(profile, probe, runs["clo"][1], disturbed_s=1.0)
        assert found.low_s <= found.simulated_s <= found.high_s
        # of the median step, as the real run is judged by its median step
        median = predict(price_run(profile, runs["clo"][1])).intervals["tpot_p50_s"]
        assert (found.low_s, found.high_s) == (median.low, median.high)
        assert found.lanes["main stream"].real_s > 0
        assert found.operations["attention"].simulated_s > 0


class TestRun:
    def test_busy_time_and_stalls_add_up(self, runs: dict[str, tuple[MachineRun, MachineRun]]) -> None:
        for _, run in runs.values():
            result = result_of(run)
            assert sum(result.busy_s.values()) + result.total_stall_s == pytest.approx(result.tpot_s, rel=1e-3)
            assert result.tpot_s == pytest.approx(float(run.step_s.mean()))
            # a streamed layer moves the tokens there are, not whole pages
            assert result.h2d_bytes_per_step == pytest.approx(
                float(run.traffic.fetched_pages.sum(axis=1).mean()) * run.plan.page_bytes, rel=0.06
            )
            assert load_result_of(result) == result

    def test_the_command_writes_what_a_simulation_writes(self, tmp_path: Path) -> None:
        out, step = tmp_path / "r.json", tmp_path / "t.json"
        small = ["run", "--layers", "2", "--context", "200", "--steps", "2", "--design", "resolve"]
        done = CliRunner().invoke(clo, [*small, "--json", "--out", str(out), "--timeline", str(step)])
        assert done.exit_code == 0, done.output
        result = load_result(out)
        printed = json.loads(done.stdout)
        assert (printed["tpot_s"], printed["model"]) == (result.tpot_s, "smollm2-135m (2 layers)")
        assert (result.executor, result.workload.steps, result.roofline) == ("machine", 2, None)
        assert load_chrome_trace(step)[0].seconds > 0
        assert "TPOT" in CliRunner().invoke(clo, small).stdout
        assert not any("left out" in assumed for assumed in result.assumptions)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["--set", "design.target_hit_rate=0.8"], "design.target_hit_rate = 0.8: left out"),
            (["--design", "clo-v1"], "design.gqa_fold = importance: left out"),
        ],
    )
    def test_what_needs_a_head_profile_is_said_to_be_left_out(self, given: list[str], said: str) -> None:
        small = ["run", "--layers", "3", "--context", "100", "--steps", "1", "--json"]
        done = CliRunner().invoke(clo, [*small, *given], catch_exceptions=False)
        assert any(assumed.startswith(said) for assumed in json.loads(done.stdout)["assumptions"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--context", "0"], "0 is not in the range"),
            (
                ["--context", "999999999", "--layers", "2"],
                r"of 999999999 tokens .* smollm2-135m \(2 layers\) has 8192",
            ),
            (["--batch", "8000", "--context", "8000", "--layers", "3"], "KV cache of 8000 prompts|device memory"),
            (["--batch", "100000000"], "100000000 is not in the range 1<=x<=65536"),
            (["--layers", "31"], "--layers 31: smollm2-135m has 30"),
            (["--model", "llama-3-70b"], "in single precision"),
            (["--weights", "smollm2-135m", "--layers", "2"], "--layers 2: real weights"),
            (["--weights", "smollm2-135m", "--model", "llama-3-8b"], "--model llama-3-8b: real weights have their own"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str) -> None:
        with pytest.raises((CloError, click.BadParameter), match=message):
            CliRunner().invoke(clo, ["run", *arguments], catch_exceptions=False, standalone_mode=False)


def load_result_of(result: Result) -> Result:
    return Result.model_validate_json(result.model_dump_json())


FEW = ("--input-tokens", "100", "--output-tokens", "2", "--num-requests", "2")


class TestExploringACalibratedMachine:
    """What was timed here is a machine like any other, and real runs have the last word."""

    @pytest.fixture
    def path(self, profile: OperationProfile, tmp_path: Path) -> Path:
        path = tmp_path / "here.json"
        path.write_text(profile.model_dump_json())
        return path

    @pytest.mark.parametrize("design", ["resident", "streamed", "resolve", "clo"])
    def test_a_clock_step_is_priced_by_timed_operations(self, design: str, path: Path) -> None:
        scene = make_scene(machine=str(path), context_tokens=CONTEXT, batch=BATCH)
        timed = load_operation_profile(path)
        assert scene.model == timed.model
        plan = scene.plan(local_design(design, SIZE, SHAPE).with_fields(dense_layers=1))
        priced = scene.priced(plan)
        traffic, seconds = priced.traffic, np.zeros(priced.num_steps)
        for node in record_step(plan).nodes:
            if node.lane is Lane.MAIN:
                cost = timed.operations[price_key(price_name(node.op), node.op.work, plan)]
                for feature, value in feature_values(node.op.work, plan, traffic).items():
                    here = np.asarray(value)[:, node.op.layer] if np.ndim(value) else value
                    seconds += cost.per_unit.get(feature, 0.0) * here
        total = sum(priced.seconds(node.op) for node in priced.graph.nodes if node.lane is Lane.MAIN)
        np.testing.assert_allclose(np.broadcast_to(total, seconds.shape), seconds, rtol=1e-9)
        result = simulate(scene, plan.design)
        assert result.measured_share == 1.0
        assert result.tpot_s >= seconds.mean() * (1 - 1e-9)

    def test_the_finalists_run_for_real_and_decide(self, path: Path) -> None:
        arguments = ["explore", "--machine", str(path), "--context", str(CONTEXT), "--batch", str(BATCH), "--json"]
        arguments += ["--set", "design.dense_layers=1", "--designs", "clo,resolve", "--steps", "3", "--measure"]
        arguments += ["--vary", "design.cache=lru,head_reuse", "--finalists", "2"]
        done = CliRunner().invoke(clo, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert [one["executor"] for one in found["measured"]] == ["machine", "machine"]
        assert {one["executor"] for one in found["finalists"]} == {"simpy"}
        fastest_run = min(found["measured"], key=lambda one: one["tpot_s"])
        assert found["best"]["executor"] == "machine"
        assert found["best"]["tpot_s"] == fastest_run["tpot_s"]
        assert {one["workload"]["steps"] for one in found["measured"]} == {3}
        arguments.remove("--json")
        text = " ".join(CliRunner().invoke(clo, arguments, catch_exceptions=False).stdout.split())
        assert "Finalists, run on this machine" in text
        assert "Best of 2 finalists run here, of 2 swept (named designs were simulated only): " in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["explore", "--measure"], "--measure: --machine must be the JSON file"),
            (["simulate", "--machine", "HERE", "--model", "llama-3-8b"], "were timed with smollm2-135m of 3 layers"),
            (["simulate", "--machine", "HERE", "--profile", "h200"], "brings its own costs"),
            (["simulate", "--machine", "HERE", "--set", "profile.read_back.seconds=1"], "needs a profile of a GPU"),
            (["serve-sim", "--machine", "HERE", "--load", "poisson:1", *FEW], "were timed with smollm2-135m"),
            (["simulate", "--machine", "nosuch.json"], "nosuch.json: No such file"),
        ],
    )
    def test_bad_input_is_refused(self, arguments: list[str], message: str, path: Path) -> None:
        with pytest.raises(CloError, match=message):
            CliRunner().invoke(
                clo,
                [str(path) if word == "HERE" else word for word in arguments],
                catch_exceptions=False,
                standalone_mode=False,
            )

    def test_services_need_costs_of_any_batch_and_context(self, path: Path) -> None:
        scene, design = make_scene(machine=str(path)), local_design("clo", SIZE, SHAPE)
        with pytest.raises(SpecError, match="serving: needs a profile of a GPU"):
            prefill_prices(scene, design, chunk_tokens=64)

    def test_another_machine_is_not_run_on(self, profile: OperationProfile, path: Path) -> None:
        foreign = profile.model_copy(update={"fingerprint": profile.fingerprint | {"processor": "abacus"}})
        path.write_text(foreign.model_dump_json())
        with pytest.raises(SpecError, match=r"--measure: here is of another machine: processor is .*, not abacus"):
            measure_here(make_scene(machine=str(path), context_tokens=CONTEXT, batch=BATCH))
