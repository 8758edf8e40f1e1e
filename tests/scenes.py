"""Scenes of the presets for tests."""

from __future__ import annotations

from typing import Any

import clo_sim
from clo import presets
from clo_sim.scene import Scene
from clo_sim.stand_in import TrafficSource

SOURCE = TrafficSource(presets.load_trace())


def scene_of(*names: str, **changes: Any) -> Scene:
    """A scene whose trace has been read before."""
    return clo_sim.make_scene(*names, source=SOURCE, **changes)


PLANNED = scene_of(context_tokens=8192, batch=2)
