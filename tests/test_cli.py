"""The command as a user meets it: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from rich.console import Console

import clo_sim
from clo import presets
from clo.errors import CloError
from clo.files import sole_writer
from clo.schedule import Lane
from clo.specs import Design, MachineSpec, ModelSpec, Spec
from clo.timeline import load_chrome_trace
from clo_cli.main import COMMANDS, clo, main
from clo_cli.models import need_engine
from clo_cli.tables import design_table

SMALL = ["--context", "32768", "--batch", "4", "--steps", "8"]


def run(*arguments: str) -> str:
    """Standard output of a command that succeeds."""
    done = CliRunner().invoke(clo, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def simulate(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("simulate", *SMALL, "--json", *arguments))
    return result


CLO = (sys.executable, "-c", "import sys; from clo_cli.main import main; sys.argv[0] = 'clo'; main()")


def refuse(*arguments: str) -> str:
    """The one line on stderr of a command that is refused with exit code 2."""
    done = subprocess.run([*CLO, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_where_there_is_no_triton_nobody_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CloError, match=r"decoding needs triton, which there is for Linux only$"):
        need_engine("decoding")


def test_a_reason_is_said_once() -> None:
    line = refuse("explore", "--no-sweep", "--designs", "clo,resolve", "--context", "2000000")
    assert line.count("accepts at most") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "Usage:" in run(command, "--help")


def test_help_lists_every_command() -> None:
    text = run("--help")
    assert all(command in text for command in COMMANDS)


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
        assert "TPOT in nine of ten cases: " in run("explore", *asked)

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

    def test_one_sequence_stays_on_the_gpu(self) -> None:
        found = json.loads(run("explore", "--batch", "1", "--no-sweep", "--steps", "8", "--json"))
        assert found["best"]["design"]["cache"] == "resident"

    def test_sixteen_sequences_are_offloaded(self) -> None:
        found = json.loads(run("explore", "--no-sweep", "--steps", "8", "--json"))
        assert found["best"]["design"]["cache"] != "resident"
        assert set(found["not_run"]) == {"resident", "resident-sparse"}


class TestShow:
    @pytest.mark.parametrize("kind", ["models", "machines", "designs", "profiles", "traces"])
    def test_lists_every_preset(self, kind: Any) -> None:
        assert set(json.loads(run("show", kind, "--json"))[kind]) == set(presets.names(kind))
        assert all(name in run("show", kind) for name in presets.names(kind))

    def test_everything_at_once(self) -> None:
        listed = json.loads(run("show", "--json"))
        assert {kind: sorted(records) for kind, records in listed.items()} == {
            kind: presets.names(kind) for kind in ("models", "machines", "designs", "profiles", "traces")
        }
        # what is shown can be read back as what it is
        for name, fields in listed["designs"].items():
            assert Design.parse(fields) == presets.load_design(name)

    @pytest.mark.parametrize(
        ("kind", "name", "record"),
        [("designs", "clo", Design), ("machines", "h200", MachineSpec), ("models", "llama-3-8b", ModelSpec)],
    )
    def test_one_thing_is_shown_with_what_each_field_means(self, kind: str, name: str, record: type[Spec]) -> None:
        shown = " ".join(run("show", kind, name).split())
        for field, about in record.model_fields.items():
            assert field in shown
            assert (about.description or "") in shown

    def test_fields_are_named_as_they_are_set(self) -> None:
        assert " gpu.hbm_bytes_per_s " in run("show", "machines", "h200")
        assert "host | events | flags | graph" in run("show", "designs", "clo")

    def test_a_profile_says_where_each_cost_is_from(self) -> None:
        costs = json.loads(run("show", "profiles", "h200", "--json"))["profiles"]["h200"]
        assert "log_latency" not in json.dumps(costs)  # packed tables say nothing to a reader
        assert costs["gemm"]["source"] == "aiconfigurator"
        assert costs["zero_copy"]["source"] == "assumed"
        assert sum(costs["sources"].values()) == 26


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["simulate", "--batch", "many"], ["--batch", "'many' is not a valid integer"]),
        (["simulate", "--colour", "red"], ["No such option", "--colour"]),
        (["fly"], ["No such command 'fly'"]),
        (["simulate", "--design", "cloe"], ["design 'cloe'", "did you mean clo"]),
        (["simulate", "--set", "design.tua=1"], ["design.tua", "unknown field"]),
        (
            ["simulate", "--set", "machine.link.h2d_bytes_per_s=-1"],
            ["machine.link.h2d_bytes_per_s = -1", "greater than 0"],
        ),
        (["simulate", "--context", "0"], ["workload.context_tokens = 0", "greater than 0"]),
        (["simulate", "--set", "design.budget_pages=100000"], ["design.budget_pages = 100000", "8192 pages"]),
        (["simulate", "--design", "resident"], ["275 GB", "offload"]),
        (["simulate", "--model", "llama-3-70b"], ["machine.gpu.memory_bytes"]),
        (["simulate", "--trace", "smollm2-135m-4k"], ["30 layers x 3 KV heads", "--resample-heads"]),
        (["explore", "--no-sweep", "--context", "2000000"], ["no design fits", "accepts at most 1048576 positions"]),
        (["simulate", "--trace", "missing.npz"], ["missing.npz"]),
        (["simulate", "--profile", "missing.json"], ["missing.json"]),
        (["simulate", "--timeline-step", "96"], ["--timeline-step = 96", "0 to 95"]),
        (["simulate", "--kv-memory-gb", "-1"], ["--kv-memory-gb = -1"]),
        (["simulate", "--context", "16"], ["workload.context_tokens = 16: fits one page", "design.page_size = 16"]),
        (["explore", "--vary", "design.tau=9"], ["design.tau = 9"]),
        (["explore", "--vary", "tua=0.9"], ["--vary tua=0.9"]),
        (["explore", "--designs", "clo,nothing"], ["design 'nothing'"]),
        (["explore", "--vary", "design.tau=0.8", "--vary", "tau=0.9"], ["design.tau is varied twice"]),
        (["explore", "--vary", "slot_budgets="], ["--vary slot_budgets=", "a value is missing"]),
        (["explore", "--no-sweep", "--vary", "tau=0.9"], ["--no-sweep", "without --vary and --evaluations"]),
        (["explore", "--no-sweep", "--evaluations", "9"], ["--no-sweep", "without --vary and --evaluations"]),
        (["simulate", "--set", "model.experts.num_experts=4"], ["model.experts.num_experts", "experts is none here"]),
        (["explore", "--designs", ""], ["--designs ''", "expected names"]),
        (["explore", "--designs", "clo,,resolve"], ["--designs 'clo,,resolve'", "expected names"]),
        (["simulate", "--set", "design.tau=true"], ["design.tau = True", "must be a number"]),
        (["simulate", "--set", "profile.schema_version=2"], ["profile.schema_version = 2", "newer clo-offload"]),
        (["plot", "missing.json", "--out", "x.png"], ["missing.json"]),
        (["simulate", "--kv-memory-gb", "nan"], ["--kv-memory-gb = nan"]),
        (["simulate", "--seed", "-1"], ["workload.seed = -1", "greater than or equal to 0"]),
        (["simulate", "--seed", "9223372036854775808"], ["workload.seed = 9223372036854775808", "less than"]),
        (["simulate", "--set", "machine.link.h2d_bytes_per_s=1e-300"], ["ZeroCopy", "machine.*"]),
        (
            ["simulate", "--out", "same.json", "--timeline", "./same.json"],
            ["--out same.json", "same file as --timeline"],
        ),
        (["trace", "nothing"], ["trace 'nothing' is unknown", "smollm2-135m-4k"]),
        (["explore", "--out", "/proc/none"], ["/proc/none", "cannot be written"]),
        (["simulate", "--timeline", "/proc/none/step.json"], ["/proc/none/step.json", "cannot be written"]),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) and value[0] in COMMANDS else "",
)
def test_bad_input_is_one_line_and_exit_code_two(arguments: list[str], parts: list[str]) -> None:
    line = refuse(*arguments)
    assert line.startswith("clo: error: ")
    assert all(part in line for part in parts), line


WRITERS = [["simulate", "--steps", "2"], ["simulate", "--steps", "2", "--json"], ["--help"], []]


@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_reader_that_has_gone_ends_quietly(arguments: list[str]) -> None:
    process = subprocess.Popen([*CLO, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLO, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.stderr == b"clo: error: output: No space left on device\n"
    assert done.returncode == 2


def test_stderr_of_a_pipe_stays_empty() -> None:
    arguments = ["explore", *SMALL, "--designs", "clo", "--vary", "design.slot_budgets=1"]
    done = subprocess.run([*CLO, *arguments], capture_output=True, timeout=120, check=True)
    assert done.stderr == b""


@pytest.mark.parametrize("width", [80, 100, 149, 150, 160, 200])
def test_no_column_is_cut_off(width: int) -> None:
    scene = clo_sim.make_scene(context_tokens=32768, batch=4)
    results = [clo_sim.simulate(scene, name, executor="clock") for name in ("clo", "recall", "streamed")]
    long = "clo prefetch_depth=1 transfer=cpu_zero_copy"
    results.append(results[0].with_fields(design=results[0].design.with_fields(name=long)))
    out = Console(width=width, file=io.StringIO(), record=True)
    out.print(design_table(results, "designs", width))
    text = out.export_text()
    assert all(line.endswith("│") for line in text.splitlines() if line.startswith("│"))
    assert "…" not in text
    assert "on-demand" in text


def test_a_terminal_is_told_of_what_takes_long() -> None:
    shown, terminal = pty.openpty()
    arguments = ["simulate", "--steps", "1", "--warmup", "1", "--synthetic", "--intervals", "--executor", "clock"]
    with subprocess.Popen([*CLO, *arguments], stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        said = b""
        while piece := _read(shown):
            said += piece
    os.close(shown)
    assert process.returncode == 0
    for phase in ("fitting a workload", "generating steps", "simulating", "prediction intervals"):
        assert phase.encode() in said


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody writes to it any more
        return b""


class TestSoleWriter:
    def test_two_runs_do_not_mix_their_results(self, tmp_path: Path) -> None:
        with sole_writer(tmp_path):
            for command in (["explore"], ["plan", "--load", "poisson:1", "--slo", "e2e_p99<30s"]):
                line = refuse(*command, "--out", str(tmp_path))
                assert f"{tmp_path}: another run is writing its results there" in line
        assert not list(tmp_path.iterdir())
        with sole_writer(tmp_path):
            pass

    def test_a_run_that_was_killed_holds_nothing(self, tmp_path: Path) -> None:
        holds = "import sys; from pathlib import Path; from clo.files import sole_writer\n"
        holds += "with sole_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
        process = subprocess.Popen(
            [sys.executable, "-c", holds, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(CloError, match="another run is writing"), sole_writer(tmp_path):
            pass
        process.kill()
        process.communicate()
        with sole_writer(tmp_path):
            pass

    def test_where_files_cannot_be_locked_nothing_is_held(self, tmp_path: Path) -> None:
        program = "import sys; sys.modules['fcntl'] = None\nfrom pathlib import Path\n"
        program += "from clo.files import sole_writer\n"
        program += "with sole_writer(Path(sys.argv[1])), sole_writer(Path(sys.argv[1])): print('both')"
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, check=True)
        assert done.stdout == b"both\n"


def test_a_trace_is_a_preset_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "renamed.bin"
    path.write_bytes((presets.folder("traces") / "smollm2-135m-4k.npz").read_bytes())
    described = run("trace", "--json")
    assert described == run("trace", "smollm2-135m-4k", "--json") == run("trace", path, "--json")


def test_a_profile_lies_beside_the_machine_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes((presets.folder("profiles") / "l40s.json").read_bytes())
    text = (presets.folder("machines") / "l40s.toml").read_text()
    machine = tmp_path / "mine.toml"
    for named, found in {"mine.json": tmp_path / "mine.json", tmp_path / "mine.json": tmp_path / "mine.json"}.items():
        machine.write_text(text.replace('profile = "l40s"', f'profile = "{named}"'))
        assert Path(presets.load_machine(str(machine)).profile) == found
        assert simulate("--machine", machine)["profile"] == "l40s"
    machine.write_text(text)
    assert presets.load_machine(str(machine)).profile == "l40s"


@pytest.mark.parametrize("option", ["--out", "--timeline"])
def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    path = tmp_path / "result.json"
    monkeypatch.setattr("sys.argv", ["clo", "simulate", *SMALL, option, str(path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"clo: error: {path}: cannot be written: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clo.files import write_whole

    path = tmp_path / "result.json"
    path.write_text("before")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), RuntimeError("?")],
)
def test_memory_that_runs_out_is_said_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr("clo_cli.main._invoke", fail)
    if str(error) == "?":
        with pytest.raises(RuntimeError, match=r"\?"):
            main()
        return
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("clo: error: memory ran out: ")
    assert said.count("\n") == 1


PROFILE = str(Path(__file__).parent.parent / "calibration" / "profiles" / "machines" / "cpu-2core.json")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["generate", "hi"], "models"),
        (["evaluate"], "models"),
        (["run"], "models"),
        (["record", "--out", "no-such.npz"], "models"),
        (["calibrate", "--out", "no-such.json"], "calibrate"),
        (["validate", "--profile", PROFILE, "--out", "no-such"], "calibrate"),
        (["heads"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_without_torch_a_command_runs_or_says_what_to_install(tmp_path: Path, arguments: list[str], extra: str) -> None:
    code = "import sys\nfor n in ('torch', 'transformers', 'triton'): sys.modules[n] = None\n"
    code += "from clo_cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if extra else 0)
    assert (f'pip install "clo-offload[{extra}]"' in done.stderr) == bool(extra)
