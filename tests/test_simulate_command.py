"""`clo simulate`: numbers, intervals, timelines."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from commands import SMALL, refuse, run, simulate

from clo.schedule import Lane
from clo.timeline import load_chrome_trace


class TestSimulate:
    def test_json_has_what_scripts_need(self) -> None:
        result = simulate()
        for key in ("tpot_s", "tokens_per_s", "hit_rate", "h2d_bytes_per_step", "device_bytes", "measured_share"):
            assert result[key] >= 0, key
        assert set(result["stall_s"]) >= {"launch", "sync", "late prefetch", "on-demand transfer"}
        assert result["tokens_per_s"] == pytest.approx(4 / result["tpot_s"])
        assert 0 < result["measured_share"] < 1

    @pytest.mark.parametrize(
        ("setting", "slower"),
        [
            ("machine.link.h2d_bytes_per_s=1e9", True),
            ("machine.link.h2d_bytes_per_s=500e9", False),
            ("design.slot_budgets=1", True),
            ("design.dense_layers=16", True),
            ("profile.read_back.seconds=0.01", True),
            ("model.num_layers=8", False),
        ],
    )
    def test_a_setting_moves_time_the_way_it_must(self, setting: str, slower: bool) -> None:
        slow_link = ["--set", "machine.link.h2d_bytes_per_s=5e9"] if "link" not in setting else []
        before, after = simulate(*slow_link), simulate(*slow_link, "--set", setting)
        assert (after["tpot_s"] > before["tpot_s"]) == slower

    def test_a_cost_set_by_hand_is_no_measurement(self) -> None:
        before, after = simulate(), simulate("--set", "profile.read_back.seconds=0.5")
        assert after["source_shares"]["assumed"] > before["source_shares"]["assumed"]

    @pytest.mark.parametrize("setting", ["profile.gemm.hbm_bytes_per_s=1e12", "profile.gemm.floor_s=1e-5"])
    def test_a_changed_table_is_no_measurement(self, setting: str) -> None:
        assert simulate("--set", setting)["measured_share"] < simulate()["measured_share"] - 0.05

    def test_a_cost_set_with_its_source_keeps_it(self) -> None:
        costs = ["--set", "profile.hit_test.latency_s=1e-3"]
        known = [*costs, "--set", "profile.hit_test.source=measured"]
        assert simulate(*known)["measured_share"] > simulate(*costs)["measured_share"] + 0.1

    def test_a_note_about_a_cost_changes_nothing(self) -> None:
        assert simulate("--set", "profile.kernel_launch.note=mine") == simulate()

    def test_intervals_are_of_every_number_of_time(self) -> None:
        result = simulate("--intervals", "--executor", "clock")
        named = {"tpot_s", "tpot_p50_s", "tpot_p99_s", "tokens_per_s", "h2d_utilisation"}
        found = {name: found for name, found in result["intervals"].items() if name in named}
        assert found.keys() == named
        assert all(low < result[name] < high for name, (low, high) in found.items())
        assert {f"stall_s.{cause}" for cause in result["stall_s"]} <= result["intervals"].keys()
        assert 0 < result["interval_share"] < 1
        assert "intervals" not in simulate() or not simulate()["intervals"]

    def test_explored_designs_have_the_intervals_of_simulated_ones(self) -> None:
        asked = [
            *SMALL,
            "--designs",
            "clo,resolve",
            "--vary",
            "design.slot_budgets=1",
            "--finalists",
            "1",
            "--intervals",
        ]
        found = json.loads(run("explore", *asked, "--json"))
        for result in (*found["named"], *found["finalists"]):
            low, high = result["intervals"]["tpot_s"]
            assert low < result["tpot_s"] < high
        alone = simulate("--design", "clo", "--intervals")
        [clo] = [result for result in found["named"] if result["design"]["name"] == "clo"]
        assert clo["intervals"] == alone["intervals"]
        named_only = ["--designs", "clo", "--no-sweep", "--intervals"]
        assert "TPOT in nine of ten cases: " in run("explore", *SMALL, *named_only)

    def test_one_design_has_its_own_share_of_measured_costs(self) -> None:
        text = run("simulate", *SMALL, "--executor", "clock")
        assert re.search(r"Measured costs account for \d+% of its busy time", text)

    def test_the_clock_sees_no_contention(self) -> None:
        result = simulate("--executor", "clock")
        assert result["executor"] == "clock"
        assert result["contention_s"] == 0

    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    def test_a_timeline_that_perfetto_opens(self, tmp_path: Path, executor: str) -> None:
        path = tmp_path / "step.json"
        out = tmp_path / "result.json"
        arguments = [*SMALL, "--executor", executor, "--timeline", path, "--timeline-step", "3", "--out", out]
        assert str(path) in run("simulate", *arguments)
        for event in json.loads(path.read_text())["traceEvents"]:
            assert {"ph", "name", "pid", "tid"} <= set(event)
            assert event["ph"] == "M" or (event["ts"] >= 0 and event["dur"] > 0)
        [timeline] = load_chrome_trace(path)
        assert Lane.MAIN in timeline.lanes
        assert timeline.seconds == pytest.approx(json.loads(out.read_text())["tpot_s"], rel=0.5)

    @pytest.mark.parametrize("design", ["clo", "staged", "recall"])
    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    def test_the_timeline_of_the_only_step_is_the_result(self, tmp_path: Path, executor: str, design: str) -> None:
        path = tmp_path / "step.json"
        chosen = ["--design", design, "--executor", executor, "--steps", "1", "--timeline", path]
        result = simulate(*chosen)
        [timeline] = load_chrome_trace(path)
        assert timeline.seconds == pytest.approx(result["tpot_s"], rel=1e-6)
        for lane, busy in result["lane_busy_s"].items():
            assert timeline.busy_s(lane) == pytest.approx(busy, rel=1e-6, abs=1e-12), lane
        moved = sum(timeline.num_bytes(op) for op in ("gather_pages", "copy_pages", "copy_staged", "bar_write"))
        assert moved == pytest.approx(result["h2d_bytes_per_step"])

    @pytest.mark.parametrize("executor", ["clock", "simpy"])
    def test_a_timeline_shows_stalls_as_slices_of_their_own(self, tmp_path: Path, executor: str) -> None:
        path = tmp_path / "step.json"
        chosen = ["--design", "staged", "--executor", executor, "--steps", "1", "--timeline", path]
        result = simulate(*chosen)
        events = json.loads(path.read_text())["traceEvents"]
        tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
        slices = [event for event in events if event["tid"] == tracks["stalls of main stream"] and event["ph"] == "X"]
        shown: dict[str, float] = {}
        for one in slices:
            shown[one["name"]] = shown.get(one["name"], 0.0) + one["dur"] / 1e6
        # the stalls between operations: the first cause of this design by far, and nothing that the result lacks
        assert shown["stall: late prefetch"] == pytest.approx(result["stall_s"]["late prefetch"], rel=1e-6)
        assert sum(shown.values()) <= sum(result["stall_s"].values()) * (1 + 1e-9)
        # slices lie where the main stream runs nothing
        main = [event for event in events if event["tid"] == tracks["main stream"] and event["ph"] == "X"]
        busy = sorted((event["ts"], event["ts"] + event["dur"]) for event in (*main, *slices))
        assert all(before[1] <= after[0] + 1e-6 for before, after in pairwise(busy))
        # and are not taken for operations when the file is read
        [timeline] = load_chrome_trace(path)
        assert timeline.lanes == tuple(name for name in tracks if not name.startswith("stalls of"))
        assert timeline.busy_s("main stream") == pytest.approx(sum(event["dur"] for event in main) / 1e6)

    def test_a_synthetic_trace_has_as_many_steps_as_asked_for(self) -> None:
        assert simulate("--synthetic", "--steps", "200", "--warmup", "8")["workload"]["steps"] == 200


class TestSaidTwice:
    @pytest.mark.parametrize(
        ("arguments", "names"),
        [
            (["--batch", "8", "--set", "workload.batch=4"], "--batch and --set workload.batch say the same"),
            (["--set", "design.tau=0.7", "--set", "design.tau=0.9"], "design.tau is set twice"),
            (["--timeline-step", "5"], "--timeline-step = 5: --timeline FILE is needed"),
        ],
    )
    def test_nothing_is_ignored(self, arguments: list[str], names: str) -> None:
        assert names in refuse("simulate", "--context", "8192", *arguments)


def test_how_few_thread_blocks_read_all_is_said() -> None:
    notes = simulate("--design", "clo")["assumptions"]
    assert "1 of the design's 16 thread blocks would be enough to read host memory" in notes
    assert not any("thread blocks" in note for note in simulate("--design", "staged")["assumptions"])
