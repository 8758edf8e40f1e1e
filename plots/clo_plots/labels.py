"""Puts names beside markers where they cover least. Knows nothing about what the markers stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""Positions, `[n, 2]`."""

_NEAR, _FAR, _DROP = 6.0, 16.0, 13.0
# offset in points from the marker, best first: beside, diagonal, above and below, then further away
_PLACES = (
    (_NEAR, 0.0, "left", "center"),
    (_NEAR, _NEAR, "left", "center"),
    (_NEAR, -_NEAR, "left", "center"),
    (-_NEAR, 0.0, "right", "center"),
    (-_NEAR, _NEAR, "right", "center"),
    (-_NEAR, -_NEAR, "right", "center"),
    (0.0, _NEAR, "center", "bottom"),
    (0.0, -_NEAR, "center", "top"),
    (_FAR, _DROP, "left", "center"),
    (_FAR, -_DROP, "left", "center"),
    (-_FAR, _DROP, "right", "center"),
    (-_FAR, -_DROP, "right", "center"),
    (_FAR, 2 * _DROP, "left", "center"),
    (_FAR, -2 * _DROP, "left", "center"),
    (-_FAR, 2 * _DROP, "right", "center"),
    (-_FAR, -2 * _DROP, "right", "center"),
)


def label_markers(axes: Axes, names: Sequence[str], at: Points, avoid: Points, *, size_pt: float) -> None:
    """Write each name beside its marker: inside the axes, off the other names and markers, off `avoid` if possible.

    The axes must have their final limits and size.
    """
    pixels = axes.transData.transform(at)
    soft = axes.transData.transform(avoid) if len(avoid) else np.empty((0, 2))
    taken = [_square(center, 4.0 * axes.figure.dpi / 72) for center in pixels]
    # from top to bottom: names of close markers then come in the order of the markers
    for index in np.argsort(-pixels[:, 1], kind="stable") if len(names) else ():
        others = np.delete(pixels, index, axis=0)
        tries = _tries(axes, names[index], at[index], size_pt)
        costs = [_cost(one, axes.bbox, taken, soft) + _doubt(one, pixels[index], others) for one in tries]
        best = tries[int(np.argmin(costs))]
        axes.add_artist(best)
        taken.append(best.get_window_extent())


def _tries(axes: Axes, name: str, spot: Points, size_pt: float) -> list[Annotation]:
    return [_annotation(axes, name, spot, size_pt, place) for place in _PLACES]


def _annotation(
    axes: Axes, name: str, spot: Points, size_pt: float, place: tuple[float, float, str, str]
) -> Annotation:
    right, up, horizontal, vertical = place
    far = max(abs(right), abs(up)) > _NEAR
    text = Annotation(
        name,
        (float(spot[0]), float(spot[1])),
        xytext=(right, up),
        textcoords="offset points",
        fontsize=size_pt,
        horizontalalignment=horizontal,
        verticalalignment=vertical,
        arrowprops={"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3} if far else None,
    )
    text.set_figure(axes.figure)
    text.axes = axes
    return text


def _cost(text: Annotation, inside: Bbox, taken: Sequence[Bbox], soft: Points) -> float:
    """Square pixels covered, what is worse weighing more; of equals the first place is taken."""
    box = text.get_window_extent()
    covered = sum(_overlap(box, other) for other in taken)
    outside = box.width * box.height - _overlap(box, inside)
    dots = int(np.count_nonzero(((soft > box.min) & (soft < box.max)).all(axis=1)))
    return 10.0 * covered + 10.0 * outside + 20.0 * dots


def _doubt(text: Annotation, own: Points, others: Points) -> float:
    """How much a name seems to belong to another marker: it is nearer to that one's height than to its own's."""
    box = text.get_window_extent()
    middle, reach = (box.y0 + box.y1) / 2, box.width + box.height
    close = others[(np.abs(others - own) < (reach, 2 * box.height)).all(axis=1)]
    nearer = np.abs(close[:, 1] - middle) < np.abs(own[1] - middle)
    return 5.0 * box.width * box.height * int(np.count_nonzero(nearer))


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _square(center: Points, half: float) -> Bbox:
    return Bbox([center - half, center + half])
