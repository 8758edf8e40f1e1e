"""Decode steps in simulated time: a clock for sweeps, a SimPy simulator for answers. Knows nothing about tensors."""

from clo_sim.explore import Exploration, explore, sweep
from clo_sim.run import simulate
from clo_sim.scene import Scene, design_of, make_scene
from clo_sim.stand_in import TrafficSource
from clo_sim.worth import worth_of_choices

__all__ = [
    "Exploration",
    "Scene",
    "TrafficSource",
    "design_of",
    "explore",
    "make_scene",
    "simulate",
    "sweep",
    "worth_of_choices",
]
