"""Layers of which nothing is ever offloaded, windowed or linear ones: designs step over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from executor_oracles import costly_profile, designs, longest_path, slow_fluid_ends
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_trace, tiny_scene

from clo.schedule import Lane
from clo.specs import Design
from clo_sim.clock import run_clock
from clo_sim.contention import Contention
from clo_sim.scene import Scene
from clo_sim.simulator import run_simpy

LINEAR = {"num_key_heads": 2, "num_value_heads": 6, "key_dim": 3, "value_dim": 5}
Places = tuple[int, ...]


def windowed(places: Places) -> dict[str, Any]:
    return {"window_tokens": 8, "windowed_layers": places}


def linear(places: Places) -> dict[str, Any]:
    return {"linear": LINEAR | {"layers": places}}


def staying(seed: int, fields: dict[str, Any]) -> Scene:
    """Three layers, some of which stay as they are."""
    scene = tiny_scene(random_trace(seed), profile=costly_profile())
    return replace(scene, model=scene.model.with_fields(**fields))


PLACES = st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
KINDS = st.sampled_from([windowed, linear])


@given(designs(), st.integers(0, 20), KINDS, PLACES)
@settings(max_examples=100, deadline=None)
def test_the_clock_is_the_longest_path(design: Design, seed: int, kind: Any, places: Places) -> None:
    scene = staying(seed, kind(places))
    priced = scene.priced(scene.plan(design))
    expected = [longest_path(priced, step) for step in range(priced.num_steps)]
    np.testing.assert_allclose(run_clock(priced).seconds, expected, rtol=1e-12)


@given(designs(), st.integers(0, 20), st.integers(0, 5), KINDS, PLACES)
@settings(max_examples=100, deadline=None)
def test_the_simulator_is_the_slow_fluid_service(
    design: Design, seed: int, step: int, kind: Any, places: Places
) -> None:
    scene = staying(seed, kind(places))
    priced = scene.priced(scene.plan(design))
    ends = slow_fluid_ends(priced, step, Contention(priced.pricer.interference))
    of_lane = {segment.lane: end for segment, end in zip(priced.segments, ends, strict=True)}
    assert run_simpy(priced).seconds[step] == pytest.approx(of_lane[Lane.LAUNCH], rel=1e-9)


@given(designs(), st.integers(0, 20), KINDS, PLACES)
@settings(max_examples=100, deadline=None)
def test_nothing_of_theirs_moves_and_the_others_do_as_without(
    design: Design, seed: int, kind: Any, places: Places
) -> None:
    scene, plain = staying(seed, kind(places)), staying(seed, {})
    found, wanted = (one.source.traffic(one.plan(design)) for one in (scene, plain))
    others = [layer for layer in range(3) if layer not in places]
    for name in ("spec_pages", "demand_pages", "spec_heads", "demand_heads", "write_back_pages", "reused_heads"):
        counts = getattr(found, name)
        assert not counts[:, list(places)].any()
        np.testing.assert_allclose(counts[:, others], getattr(wanted, name)[:, others])
