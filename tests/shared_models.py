"""Scenes in which GPUs share a model, and what their all-reduces cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from clo import presets
from clo.kernel_tables import AllReduceTable
from clo.profile import Profile
from clo.results import Result
from clo_sim.run import simulate
from clo_sim.scene import Scene


def shared(scene: Scene, gpus: int, profile: Profile | None = None) -> Scene:
    """So many GPUs hold the model together."""
    machine = scene.machine.with_fields(tensor_parallel=gpus)
    return replace(scene, machine=machine, profile=profile or scene.profile)


def with_all_reduce(profile: Any, seconds: float, **fields: Any) -> Profile:
    """Every all-reduce takes `seconds`."""
    axes = {"num_gpus": (2.0, 8.0), "num_values": (1.0, 1e9)}
    rates = {"hbm_bytes_per_s": profile.gemm.hbm_bytes_per_s, "flops_per_s": profile.gemm.flops_per_s}
    table = AllReduceTable.from_latencies(np.full((2, 2), seconds), **axes, **rates, **fields)
    changed: Profile = profile.model_copy(update={"all_reduce": table})
    return changed


def free_and_paid(scene: Scene, seconds: float) -> list[Result]:
    """Steps without transfers whose all-reduces take nothing, and `seconds` each."""
    design = presets.load_design("resident").with_fields(sync="graph")
    profiles = (with_all_reduce(scene.profile, each) for each in (1e-30, seconds))
    return [simulate(replace(scene, profile=profile), design, executor="clock") for profile in profiles]
