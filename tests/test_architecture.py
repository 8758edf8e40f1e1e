"""Who may import whom, what starts fast, and what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"clo", "clo_sim", "clo_kernels", "clo_calibration", "clo_plots", "clo_cli"}
STDLIB = set(sys.stdlib_module_names)

# room: (folder, what it may import beside the standard library and itself)
ROOMS = {
    "vocabulary": ("clo", {"numpy", "pydantic"}),
    "engine": (
        "clo/engine",
        # the hub's client comes with transformers
        {
            "clo",
            "clo_kernels",
            "numpy",
            "torch",
            "transformers",
            "huggingface_hub",
            "gguf",
            "tokenizers",
            "safetensors",
        },
    ),
    "kernels": ("kernels/clo_kernels", {"torch", "triton"}),
    # optuna and distributed come with extras: imported where they are used only
    "sim": ("sim/clo_sim", {"clo", "simpy", "numpy", "optuna", "distributed"}),
    "calibration": (
        "calibration/clo_calibration",
        {"clo", "clo_sim", "clo_kernels", "numpy", "scipy", "torch", "pydantic", "pyarrow", "click"},
    ),
    "plots": ("plots/clo_plots", {"clo", "numpy", "pyarrow", "matplotlib"}),
    "cli": (
        "cli/clo_cli",
        {"clo", "clo_sim", "clo_plots", "clo_calibration", "click", "rich", "pyarrow", "matplotlib"},
    ),
}


def files_of(room: str) -> list[Path]:
    folder = ROOT / ROOMS[room][0]
    found = sorted(folder.rglob("*.py"))
    return [path for path in found if room != "vocabulary" or (ROOT / "clo/engine") not in path.parents]


def imports(path: Path) -> list[str]:
    """Full names of every module a file imports, wherever in the file."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


CASES = [pytest.param(room, path, id=str(path.relative_to(ROOT))) for room in ROOMS for path in files_of(room)]


@pytest.mark.parametrize(("room", "path"), CASES)
def test_imports_go_downward_only(room: str, path: Path) -> None:
    own = ROOMS[room][0].split("/")[-1] if room != "engine" else "clo"
    allowed = ROOMS[room][1] | STDLIB | {own}
    for name in imports(path):
        assert name.split(".")[0] in allowed, f"{name} is not for {room}"
        engine_only = name.startswith("clo.engine")
        assert not engine_only or room in ("engine", "cli", "calibration"), f"{name} is not for {room}"


def test_every_room_is_watched() -> None:
    watched = {path for room in ROOMS for path in files_of(room)}
    shipped = {path for name in OURS for folder in ROOT.rglob(name) if folder.is_dir() for path in folder.rglob("*.py")}
    outside = {path for path in shipped - watched if ".venv" not in path.parts and "build" not in path.parts}
    assert not outside


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_simulation_needs_no_torch_and_no_figures() -> None:
    heavy = {"torch", "transformers", "triton", "matplotlib", "pyarrow", "scipy", "pandas", "optuna", "distributed"}
    assert not loaded_by("import clo, clo_sim") & heavy
    run = "import clo_sim\nclo_sim.simulate(clo_sim.make_scene('smollm2-135m', context_tokens=4096, batch=1), 'clo')"
    assert not loaded_by(run) & heavy


def test_help_needs_nothing_but_click() -> None:
    code = "import clo_cli.main as m\ntry:\n    m.clo(['--help'])\nexcept SystemExit:\n    pass"
    assert not loaded_by(code) & {"numpy", "pydantic", "rich", "simpy", "torch", "matplotlib"}


def test_wheel_holds_our_packages_and_the_profiles(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == OURS
    for needed in ("profiles/h200.json", "traces/smollm2-135m-4k.npz", "designs/clo.toml"):
        assert f"clo/presets/{needed}" in names
    assert "clo_calibration/costs/common.toml" in names
    assert {f"{package}/py.typed" for package in OURS} <= set(names)
