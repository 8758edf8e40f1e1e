"""Measured mixtures of experts as points of two sizes, and moved to the nodes of a grid. Knows nothing about tables.

A point is `[tokens, hidden_size, intermediate_size, experts_per_token, num_experts, num_gpus]`. Experts were used
evenly: all of them, or, of fewer passes than there are experts, one each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clo.kernel_tables import Floats
from clo_calibration.tables.measurements import Samples

TOKENS, HIDDEN, WIDTH, PER_TOKEN, EXPERTS, GPUS = range(6)
NODES_PER_OCTAVE = (2, 1)
"""Of the weights read and of the rows of each expert."""


def sizes(points: Floats) -> Floats:
    """Weights that were read, and rows of each expert that was used: `[num, 2]`."""
    passes = points[:, TOKENS] * points[:, PER_TOKEN]
    used = np.minimum(points[:, EXPERTS], passes)
    weights = 3.0 * used * points[:, HIDDEN] * points[:, WIDTH] / points[:, GPUS]
    return np.stack([weights, passes / used], axis=1)


def models(points: Floats) -> Floats:
    """A number for each model, the same for all its points: experts of one hidden size, width and count."""
    columns = points[:, [HIDDEN, WIDTH, PER_TOKEN, EXPERTS]]
    return np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1).astype(np.float64)


def no_slower(samples: Samples, others: Samples, *, unmatched: bool = False) -> Samples:
    """Those of `samples` that took no longer than the same point of `others`: slower kernels nobody would choose.

    Points that `others` have not stay if `unmatched` may.
    """
    unknown = np.inf if unmatched else 0.0
    limits = dict(zip(map(tuple, others.points.tolist()), others.seconds.tolist(), strict=True))
    times = zip(map(tuple, samples.points.tolist()), samples.seconds.tolist(), strict=True)
    return samples.take(np.array([seconds <= limits.get(point, unknown) for point, seconds in times], dtype=bool))


def no_faster_than_memory(samples: Samples, weight_bytes: float, hbm_bytes_per_s: float) -> Samples:
    """Those in which every weight used can have been read: others were used less evenly, or stayed in a cache."""
    weights, _ = sizes(samples.points).T
    return samples.take(samples.seconds >= weights * weight_bytes / hbm_bytes_per_s)


def on_nodes(samples: Samples, roofline: Callable[..., Floats]) -> Samples:
    """`samples` at the nearest nodes of a grid in their two sizes, carried there along the roofline above the floor.

    What falls on one node is averaged, in logs.
    """
    points, floor = sizes(samples.points), samples.seconds.min()
    nodes = np.stack([_nearest(column, per) for column, per in zip(points.T, NODES_PER_OCTAVE, strict=True)], axis=1)
    moved = floor + (samples.seconds - floor) * roofline(*nodes.T) / roofline(*points.T)
    places, where = np.unique(nodes, axis=0, return_inverse=True)
    where = where.reshape(-1)
    means = np.bincount(where, np.log(moved)) / np.bincount(where)
    return Samples(points=places, seconds=np.exp(means), labels=samples.labels)


def _nearest(values: Floats, per_octave: int) -> Floats:
    return np.asarray(2.0 ** (np.round(np.log2(values) * per_octave) / per_octave))
