"""A trace of four steps that can be followed by hand, and what caches do over traces."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tiny import make_trace, tiny_design, tiny_scene

from clo.trace import AttentionTrace
from clo_sim.replay import HeadHistory, policy_of, replay

TAU = math.cos(math.radians(30))
"""Queries within 30 degrees of the anchor are hits."""


# four steps, two layers of two heads; pages 1 to 10 are candidates, prefill leaves the last ones in the slots
A = [[1, 2], [2, 3], [3, 1], [1, 2]]
B = [[9, 10], [10, 4], [9, 4], [9, 4]]
C = [[1, 2], [2, 3], [2, 3], [5, 6]]
D = [[7, 8], [7, 8], [7, 8], [7, 8]]
ANGLES = {"A": [0, 20, 40, 80], "B": [0, 0, 0, 0], "C": [0, 0, 45, 45], "D": [0, 50, 100, 150]}
PREDICTED_C = [[1, 5], [2, 3], [2, 4], [5, 6]]
PREDICTED_D = D
PREDICTED_ANGLES = {"C": [10, 50, 45, 0], "D": [0, 50, 100, 150]}


def paper_trace() -> AttentionTrace:
    """Layer 0 has heads A and B, layer 1 has C and D."""
    steps = range(4)
    return make_trace(
        [[[A[s], B[s]], [C[s], D[s]]] for s in steps],
        angles=[[[ANGLES["A"][s], ANGLES["B"][s]], [ANGLES["C"][s], ANGLES["D"][s]]] for s in steps],
        predicted_pages=[[[A[s], B[s]], [PREDICTED_C[s], PREDICTED_D[s]]] for s in steps],
        predicted_angles=[[[0, 0], [PREDICTED_ANGLES["C"][s], PREDICTED_ANGLES["D"][s]]] for s in steps],
    )


def history(trace: AttentionTrace, budget: int = 2, **changes: Any) -> HeadHistory:
    plan = tiny_scene(trace).plan(tiny_design(budget, **changes))
    return replay(trace, policy_of(plan, trace))


def columns(values: Any) -> list[list[int]]:
    """One list of steps per head."""
    return np.asarray(values).T.astype(int).tolist()
