"""Every example runs as a user would run it, and says what the library says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import clo_sim

EXAMPLES = Path(__file__).parent.parent / "examples"


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
