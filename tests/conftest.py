"""Makes the helpers beside the tests importable under `--import-mode=importlib`, and chooses Triton's interpreter.

The choice must be made before any test file imports a kernel: without a GPU kernels are interpreted.
"""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from clo_sim.scene import Scene

# how long an example takes says how busy the machine is
settings.register_profile("clo", deadline=None)
settings.load_profile("clo")

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "engine")]


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a shell's background job begins with interrupts ignored; tests of Ctrl-C, and the commands they start, must hear them
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def scene() -> "Scene":
    """Four sequences of 32K tokens of Llama-3-8B on an H200: every design fits, transfers matter."""
    import clo_sim

    return clo_sim.make_scene(
        "llama-3-8b", workload=clo_sim.make_scene().workload.with_fields(context_tokens=32768, batch=4, steps=12)
    )
