"""The command as a user meets it: its help, and how it says no."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from commands import refuse, run

from clo.errors import CloError
from clo_cli.main import COMMANDS, clo, main
from clo_cli.models import need_engine


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert "Usage:" in run(command, "--help")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_eighty_columns_and_says_what_every_option_is(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(command, "--help")
    assert [line for line in text.splitlines() if len(line) > 80] == []
    options = clo.get_command(click.Context(clo), command).params
    assert [one.name for one in options if isinstance(one, click.Option) and not one.help] == []


def test_help_lists_every_command() -> None:
    text = run("--help")
    assert all(command in text for command in COMMANDS)


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
        (["simulate", "--timeline", "out.json", "--timeline-step", "96"], ["--timeline-step = 96", "0 to 95"]),
        (["simulate", "--kv-memory-gb", "-1"], ["--kv-memory-gb = -1"]),
        (["simulate", "--context", "16"], ["workload.context_tokens = 16: fits one page", "design.page_size = 16"]),
        (["explore", "--vary", "design.tau=9"], ["design.tau = 9"]),
        (["explore", "--vary", "tua=0.9"], ["--vary tua=0.9"]),
        (["explore", "--vary", "batch=4,8"], ["--vary batch=4,8", "did you mean workload.batch?"]),
        (["explore", "--vary", "context=4096"], ["did you mean workload.context_tokens?"]),
        (["simulate", "--model", "org/Llama-8B"], ["model 'org/Llama-8B' is unknown", "config.json or model folder"]),
        (["serve-sim", "--requests", "missing.jsonl"], ["--requests missing.jsonl: no such file", "--load poisson:2"]),
        (["serve-sim"], ["--requests FILE or --load KIND:RATE is needed", "--load poisson:2"]),
        (["explore", "--designs", "clo,nothing"], ["design 'nothing'"]),
        (["explore", "--vary", "design.tau=0.8", "--vary", "tau=0.9"], ["design.tau is varied twice"]),
        (["explore", "--vary", "slot_budgets="], ["--vary slot_budgets=", "a value is missing"]),
        (["explore", "--no-sweep", "--vary", "tau=0.9"], ["--no-sweep", "without --vary and --evaluations"]),
        (["explore", "--no-sweep", "--evaluations", "9"], ["--no-sweep", "without --vary and --evaluations"]),
        (["simulate", "--set", "model.experts.num_experts=4"], ["model.experts.num_experts", "experts is none here"]),
        (["explore", "--designs", ""], ["--designs = ''", "expected names"]),
        (["explore", "--designs", "clo,,resolve"], ["--designs = 'clo,,resolve'", "expected names"]),
        (["simulate", "--set", "design.tau=true"], ["design.tau = True", "must be a number"]),
        (["simulate", "--set", "profile.schema_version=2"], ["profile.schema_version = 2", "newer clo-offload"]),
        (["plot", "missing.json", "--out", "x.png"], ["missing.json"]),
        (["simulate", "--kv-memory-gb", "nan"], ["--kv-memory-gb = nan"]),
        (["simulate", "--seed", "-1"], ["workload.seed = -1", "greater than or equal to 0"]),
        (["simulate", "--seed", "9223372036854775808"], ["workload.seed = 9223372036854775808", "less than"]),
        (["simulate", "--set", "machine.link.h2d_bytes_per_s=1e-300"], ["ZeroCopy", "machine.*"]),
        (
            ["simulate", "--out", "same.json", "--timeline", "./same.json"],
            ["same.json: asked for twice"],
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


def test_a_reason_is_said_once() -> None:
    line = refuse("explore", "--no-sweep", "--designs", "clo,resolve", "--context", "2000000")
    assert line.count("accepts at most") == 1


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


def test_where_there_is_no_triton_nobody_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CloError, match=r"decoding needs triton, which there is for Linux only$"):
        need_engine("decoding")


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
