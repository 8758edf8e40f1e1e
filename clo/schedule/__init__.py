"""The decode step as generators over an abstract machine, and its recording as a graph."""

from clo.schedule.decode import decode_step
from clo.schedule.graph import Dependency, Node, StepGraph, record_step
from clo.schedule.machine import Cause, HostWait, Lane, Machine, Op, Part, Step, Token

__all__ = [
    "Cause",
    "Dependency",
    "HostWait",
    "Lane",
    "Machine",
    "Node",
    "Op",
    "Part",
    "Step",
    "StepGraph",
    "Token",
    "decode_step",
    "record_step",
]
