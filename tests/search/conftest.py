"""The question that these tests ask."""

from __future__ import annotations

import pytest

import clo_sim
from clo_sim.scene import Scene
from clo_sim.variation import scene_with


@pytest.fixture(scope="module")
def scene() -> Scene:
    """A question that takes milliseconds: a small model, few steps, little memory."""
    small = clo_sim.make_scene("smollm2-135m", context_tokens=4096, batch=2, kv_memory_bytes=250e6)
    return scene_with(small, [("workload.steps", 4), ("workload.warmup_steps", 8)])
