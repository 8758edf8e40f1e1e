"""Puts names beside markers where they cover least. Knows nothing about what the markers stand for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
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
    *(
        (side * _FAR, way * drop * _DROP, "left" if side > 0 else "right", "center")
        for drop in (1, 2, 3, 4)
        for side in (1, -1)
        for way in (1, -1)
    ),
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
        own = pixels[index]
        costs = [
            _cost(one, axes.bbox, taken, soft) + _doubt(one, own, others) + _crossing(one, own, taken) for one in tries
        ]
        best = tries[int(np.argmin(costs))]
        axes.add_artist(best)
        taken.append(_box(best))


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
    box = _box(text)
    covered = sum(_overlap(box, other) for other in taken)
    outside = box.width * box.height - _overlap(box, inside)
    dots = int(np.count_nonzero(((soft > box.min) & (soft < box.max)).all(axis=1)))
    return 10.0 * covered + 10.0 * outside + 20.0 * dots


def _doubt(text: Annotation, own: Points, others: Points) -> float:
    """How much a name seems to belong to another marker: it is nearer to that one's height than to its own's.

    A line to its own marker leaves little doubt.
    """
    if text.arrow_patch is not None:
        return 0.0
    box = _box(text)
    middle, reach = (box.y0 + box.y1) / 2, box.width + box.height
    close = others[(np.abs(others - own) < (reach, 2 * box.height)).all(axis=1)]
    nearer = np.abs(close[:, 1] - middle) < np.abs(own[1] - middle)
    return 5.0 * box.width * box.height * int(np.count_nonzero(nearer))


def _crossing(text: Annotation, own: Points, taken: Sequence[Bbox]) -> float:
    """How much of the line to its marker lies on other names and markers."""
    if text.arrow_patch is None:
        return 0.0
    # matplotlib draws it towards the middle of the words; what is next to the marker is the marker's
    middle = np.asarray(_box(text).get_points()).mean(axis=0)
    along = own + np.linspace(0.3, 1.0, 20)[:, None] * (middle - own)
    on = [((along > other.min) & (along < other.max)).all(axis=1) for other in taken]
    return 100.0 * float(np.count_nonzero(on))


def _box(text: Annotation) -> Bbox:
    """What the words cover, without the line to the marker."""
    text.get_window_extent()  # puts the words where they belong
    return Text.get_window_extent(text)


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


def _square(center: Points, half: float) -> Bbox:
    return Bbox([center - half, center + half])
