"""Every example runs as a user would run it, and says what the library says; so do the pages that teach and explain."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import clo_sim
from clo.specs import Design, MachineSpec, ModelSpec
from clo.units import format_seconds
from clo_cli.main import clo

EXAMPLES = Path(__file__).parent.parent / "examples"
DOCS = EXAMPLES.parent / "docs"


def run(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_prints_what_simulate_returns() -> None:
    scene = clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=131072, batch=16)
    full = clo_sim.simulate(scene, "clo")
    first, second = re.findall(r"^([\d.]+) ms", run("quickstart.py"), flags=re.MULTILINE)
    assert first == f"{full.tpot_s * 1e3:.1f}"
    assert float(second) > float(first)


def test_readme_shows_the_quickstart() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert shown is not None
    lines = [line for line in shown[1].splitlines() if line]
    assert all(line in (EXAMPLES / "quickstart.py").read_text(encoding="utf-8") for line in lines)


def test_two_gpus_share_one_environment() -> None:
    tokens = dict(re.findall(r"'([\w-]+)': (\d+)", run("inside_simpy.py")))
    scene = clo_sim.make_scene(model="llama-3-8b", machine="h200", context_tokens=131072, batch=16)
    for name, produced in tokens.items():
        # half a second of steps of this design, of which 32 are decoded at most
        expected = 16 * min(32, int(0.5 / clo_sim.simulate(scene, name).tpot_s))
        assert abs(int(produced) - expected) <= 2 * 16, name


def test_what_fits_on_a_machine_of_ones_own() -> None:
    rows = [line.split() for line in run("own_machine.py").splitlines()[1:]]
    times = {int(row[0]): re.findall(r"no room|[\d.]+ ms", " ".join(row[1:])) for row in rows}
    assert times[524288][0] == "no room"
    for resident, offloaded, faster_link in times.values():
        assert float(faster_link.split()[0]) <= float(offloaded.split()[0])
        # what moves costs something, and a selector that is asked less often less
        assert resident == "no room" or float(offloaded.split()[0]) < 1.1 * float(resident.split()[0])


def test_a_selector_of_ones_own_is_simulated() -> None:
    said = run("own_selector.py")
    (exact, exact_gb), (voted, voted_gb) = re.findall(r": ([\d.]+) ms per token, ([\d.]+) GB", said)
    design = clo_sim.design_of("resolve").with_fields(slot_budgets=2)
    assert exact == f"{clo_sim.simulate(clo_sim.make_scene(), design).tpot_s * 1e3:.1f}"
    # votes of several steps change less from one step to the next
    assert float(voted_gb) < float(exact_gb)
    assert float(voted) < float(exact)
    shared = re.search(r"(\d+)% of the exact choice", said)
    assert shared is not None
    assert 50 < int(shared[1]) < 100


COURSE = re.findall(r"^    clo (simulate .*?)  +# (.+)$", (DOCS / "teaching.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize(("command", "said"), COURSE)
def test_the_course_quotes_what_commands_print(command: str, said: str) -> None:
    done = CliRunner().invoke(clo, [*shlex.split(command), "--json"], catch_exceptions=False)
    assert format_seconds(json.loads(done.stdout)["tpot_s"]) == said


def test_the_course_begins_with_a_refusal() -> None:
    done = CliRunner().invoke(clo, ["simulate", "--design", "resident"])
    assert "its KV needs 275 GB" in str(done.exception)
    assert len(COURSE) >= 15


def test_bounds_shown_in_the_docs_can_be_kept() -> None:
    text = (DOCS / "exploring.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    clo (explore --objective .* --require .*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        done = CliRunner().invoke(clo, [*shlex.split(command), "--steps", "8"], catch_exceptions=False)
        assert done.exit_code == 0, command


class TestOwn:
    """docs/own.md: its files are what it says they are, and its commands run on them."""

    TEXT = (DOCS / "own.md").read_text(encoding="utf-8")

    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name, block in re.findall(r"```toml\n# (\S+)\n(.*?)```", self.TEXT, re.DOTALL):
            (tmp_path / name).write_text(block, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_files_are_complete(self, here: Path) -> None:
        for name, record in (("model", ModelSpec), ("machine", MachineSpec), ("design", Design)):
            record.parse(tomllib.loads((here / f"{name}.toml").read_text(encoding="utf-8")))

    def test_further_tables_belong_to_a_model(self, here: Path) -> None:
        model = tomllib.loads((here / "model.toml").read_text(encoding="utf-8"))
        further = re.findall(r"```toml\n(?!# \S+\n)(.*?)```", self.TEXT, re.DOTALL)
        assert len(further) == 6
        tables = [tomllib.loads(block) for block in further]
        latent = next(fields for fields in tables if "latent" in fields)
        for fields in tables:
            vectors = "block_tokens" not in fields.get("indexer", {"block_tokens": 1})
            spec = ModelSpec.parse(model | (latent if vectors else {}) | fields)
            assert all(getattr(spec, field) for field in fields)

    def test_commands_run(self, here: Path) -> None:
        for line in re.findall(r"^    clo (.*)$", self.TEXT, re.MULTILINE):
            quick = ["--no-sweep", "--no-figures", "--steps", "4"] if line.startswith("explore") else []
            done = CliRunner().invoke(clo, [*shlex.split(line), *quick], catch_exceptions=False)
            assert done.exit_code == 0, line
        assert (here / "step.png").exists()

    def test_python_runs(self, here: Path) -> None:
        code = re.search(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        assert code is not None
        done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, timeout=120, check=True)
        assert len(re.findall(r"^\d+ [\d.]+ ms ", done.stdout, re.MULTILINE)) == 3
