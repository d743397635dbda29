"""Chooses images to show on a map and places them beside their points without overlap."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sslx.plot.canvas import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Positions = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
SIDE, GAP = 0.47, 0.05
"""Side of a thumbnail and gap between two of them, in inches."""
MAX_ADJACENT, MIN_TOTAL = 72, 48
"""At most 72 thumbnails touch their points.  If these are fewer than 48, further ones, up to 48 in total, stand a
little away from their points and are connected to them by lines."""
_DIRECTIONS = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)], dtype=np.float64)
_DISTANCES = (0.3, 0.6, 0.9, 1.2, 1.6, 2.0)  # in sides of a thumbnail


def arrange(points: Positions, side: float, gap: float) -> tuple[Rows, Positions]:
    """Choose points (N, 2) whose images are shown: their rows (n,) and the lower left corners (n, 2) of their squares.

    The squares keep a gap, lie at most about a side beyond the outermost points, and do not cover the point or the line
    of another square.  Points are tried in an order in which each is as far as possible from those before, so that the
    images spread over the map.
    """
    order = _farthest_first(points)
    bounds = points.min(0) - side - 2 * gap, points.max(0) + side + 2 * gap
    corner_of: dict[int, Positions] = {}
    kept_visible = np.empty((0, 2))  # points along the lines, and the points of the map at their ends
    for distances, max_total in (((0.0,), MAX_ADJACENT), (_DISTANCES, MIN_TOTAL)):
        for row in order:
            if len(corner_of) >= max_total or row in corner_of:
                continue
            for distance in distances:
                candidates = points[row] + _DIRECTIONS * (side / 2 + gap / 2 + distance * side) - side / 2
                corners = np.array(list(corner_of.values())).reshape(-1, 2)
                corner, line = _best_corner(candidates, corners, points, points[row], kept_visible, bounds, side, gap)
                if corner is not None:
                    corner_of[int(row)] = corner
                    kept_visible = np.concatenate([kept_visible, line])
                    break
    rows = sorted(corner_of)
    return np.array(rows, dtype=np.int64), np.array([corner_of[row] for row in rows]).reshape(-1, 2)


def _best_corner(
    candidates: Positions,
    corners: Positions,
    points: Positions,
    point: Positions,
    kept_visible: Positions,
    bounds: tuple[Positions, Positions],
    side: float,
    gap: float,
) -> tuple[Positions | None, Positions]:
    """Return the candidate corner whose square hides the fewest points, and points along the line to it from ``point``.

    corners: of the squares that are already placed.  Returns None for the corner if no candidate is free.
    """
    is_free = ((candidates >= bounds[0]) & (candidates + side <= bounds[1])).all(1)
    is_free &= ~np.any(np.abs(candidates[:, None] - corners).max(2, initial=0) < side + gap, axis=1)
    is_free &= _inside(kept_visible, candidates - gap / 2, side + gap).sum(1) == 0
    lines = point + (np.clip(point, candidates, candidates + side) - point)[:, None] * np.linspace(0, 1, 20)[:, None]
    is_free &= np.array([not _inside(line, corners, side).any() for line in lines])
    if not is_free.any():
        return None, np.empty((0, 2))
    num_hidden = np.where(is_free, _inside(points, candidates, side).sum(1), len(points) + 1)
    best = int(num_hidden.argmin())
    return candidates[best], lines[best]


def _inside(points: Positions, corners: Positions, side: float) -> npt.NDArray[np.bool_]:
    """Return which points (N, 2) lie in which squares, (n, N).  corners: lower left corners (n, 2) of the squares."""
    offset = points - corners[:, None]
    return (offset.min(2, initial=np.inf) >= 0) & (offset.max(2, initial=0) <= side)


def _farthest_first(points: Positions) -> Rows:
    """Return all rows, starting at the middle of the map, each as far as possible from those before."""
    middle = (points.max(0) + points.min(0)) / 2
    order = [int(np.square(points - middle).sum(1).argmin())]
    nearest = np.full(len(points), np.inf)
    for _ in range(len(points) - 1):
        nearest = np.minimum(nearest, np.square(points - points[order[-1]]).sum(1))
        nearest[order] = -1
        order.append(int(nearest.argmax()))
    return np.array(order, dtype=np.int64)


def draw_thumbnails(
    axes: "Axes", points: Positions, corners: Positions, images: npt.NDArray[np.float32], side: float
) -> None:
    """Draw images (n, S, S, 3) with their lower left corners at ``corners`` (n, 2), and lines to their ``points``."""
    limits = axes.get_xlim(), axes.get_ylim()
    for point, corner, image in zip(points, corners, images, strict=True):
        (x, y), (to_x, to_y) = point, np.clip(point, corner, corner + side)
        axes.plot([x, to_x], [y, to_y], color=INK, linewidth=1, zorder=2)
        left, bottom = corner
        right, top = corner + side
        axes.imshow(image, extent=(left, right, bottom, top), zorder=3)
        frame = [left, right, right, left, left], [bottom, bottom, top, top, bottom]
        axes.plot(*frame, color=SOFT, linewidth=0.6, zorder=3.5)
    axes.scatter(*points.T, s=26, c=INK, edgecolors="white", linewidths=1, zorder=4)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
