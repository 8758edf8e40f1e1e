"""Runs Python with a CUDA build of torch on a machine without a GPU: the rehearsal of what has to run on one.

    python tests/rehearsal/run.py -m pytest tests/engine/test_cuda_decoder.py
    python tests/rehearsal/run.py --kernels compiled -m clo_cli.main run --device cuda --layers 2 --context 512

The CUDA runtime and driver are stand-ins, built from the C files here by `cc` (or $CC): device memory is the process's
own, torch's operations are done by the CPU in it, each stream is a thread, and graphs are captured and launched under
the rules for captures. So every call that is made of torch, of Triton and of the driver is a real one, every number is
right, and what is used before its event has happened is wrong. What it cannot show: other orders within a graph than
that of its capture (tests/engine/test_cuda_machine.py does), what a GPU's own libraries compute, and any time.

Needs torch built for CUDA 13, its headers (which come with it) and Triton. `--kernels`: `references` are done in the
kernels' place (the default); `compiled` code is run instruction by instruction, a second or so a launch; `nothing`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ("references", "compiled", "nothing")
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
LACKING = "torch built for CUDA 13, with the headers that come with it, and Triton"


def main(arguments: Sequence[str]) -> int:
    """Run Python with the rest of the arguments. Ends with its exit status, or 2 if something is lacking."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="run.py [--kernels KIND] ...", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", choices=KINDS, default="references", help="what is done where one is launched")
    # what follows is Python's, options too
    ours = 2 if arguments[:1] == ["--kernels"] else int(arguments[:1] in (["-h"], ["--help"]))
    options = parser.parse_args(arguments[:ours])
    headers = find_headers()
    if not headers:
        print(f"rehearsal: {sys.executable} lacks {LACKING}", file=sys.stderr)
        return 2
    libraries = build(headers)
    return subprocess.run([sys.executable, *arguments[ours:]], env=environment(libraries, options.kernels)).returncode


def find_headers() -> list[Path]:
    """Folders of the runtime's headers, and of those that they include; none without a CUDA 13 build of torch."""
    found = []
    for package, folder, header in (
        ("nvidia", "cu13/include", "cuda_runtime_api.h"),
        ("triton", "backends/nvidia/include", "crt/host_defines.h"),
    ):
        spec = importlib.util.find_spec(package)
        places = [Path(place) / folder for place in spec.submodule_search_locations or ()] if spec else []
        found += [place for place in places if (place / header).exists()][:1]
    return found if len(found) == 2 else []


def build(headers: list[Path]) -> Path:
    """The folder of the two libraries; they are kept until their sources change."""
    sources = [*sorted(HERE.glob("*.[ch]")), HERE / "runtime.map", Path(__file__)]
    text = b"".join(source.read_bytes() for source in sources) + "".join(map(str, headers)).encode()
    folder = Path(tempfile.gettempdir()) / f"clo-rehearsal-{os.getuid()}-{hashlib.sha256(text).hexdigest()[:12]}"
    if not (folder / DRIVER).exists():
        folder.mkdir(exist_ok=True)
        version_script = f"-Wl,--version-script={HERE / 'runtime.map'}"
        compile_library(
            headers, ["runtime.c", "memory.c", "device.c", "absent.c"], folder / RUNTIME, version_script, "-ldl"
        )
        compile_library(headers, ["driver.c"], folder / DRIVER, f"-L{folder}", f"-l:{RUNTIME}")
    return folder


def compile_library(headers: list[Path], sources: list[str], target: Path, *options: str) -> None:
    """`target` appears whole or not at all."""
    half = target.with_suffix(f".{os.getpid()}")
    command = [os.environ.get("CC", "cc"), "-O1", "-fPIC", "-shared", f"-Wl,-soname,{target.name}"]
    command += [f"-I{folder}" for folder in headers] + [str(HERE / source) for source in sources]
    subprocess.run([*command, "-o", str(half), *options, "-lpthread"], check=True)
    half.rename(target)


def environment(libraries: Path, kernels: str) -> dict[str, str]:
    """In which torch and Triton find the stand-ins first, and Python the operations."""
    sources = [ROOT / name for name in ("", "sim", "kernels", "calibration", "plots", "cli", "tests/engine", "tests")]
    before = {name: os.environ.get(name, "") for name in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    return os.environ | {
        "CLO_REHEARSAL": kernels,
        "LD_PRELOAD": f"{libraries / RUNTIME}:{libraries / DRIVER}",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), before["LD_LIBRARY_PATH"]])),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "site"), *map(str, sources), before["PYTHONPATH"]])),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
