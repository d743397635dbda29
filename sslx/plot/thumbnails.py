"""Which images of a map are shown on it, and where: beside their points, over no other one."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sslx.plot.canvas import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Places = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
SIDE, GAP = 0.47, 0.05
"""Of a thumbnail and between two of them, in inches."""
MOST, ENOUGH = 72, 48
"""With fewer than enough beside their points, further ones stand a little away from theirs, at the end of a line."""
_DIRECTIONS = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)], dtype=np.float64)
_AWAY = (0.3, 0.6, 0.9, 1.2, 1.6, 2.0)  # sides


def arrange(places: Places, side: float, gap: float) -> tuple[Rows, Places]:
    """(Rows (n,) of the places (N, 2) whose images are shown, the lower left corners (n, 2) of their squares).

    The squares keep a gap, lie within a side of the outermost places, and hide neither the place nor the line of
    another one.  Places are tried farthest first, each as far as can be from those before, so that the images cover
    the map.
    """
    order = _farthest_first(places)
    room = places.min(0) - side - 2 * gap, places.max(0) + side + 2 * gap
    found: dict[int, Places] = {}
    seen = np.empty((0, 2))  # of the lines, and the places at their ends
    for steps_away, most in (((0.0,), MOST), (_AWAY, ENOUGH)):
        for row in order:
            if len(found) >= most or row in found:
                continue
            for away in steps_away:
                corners = places[row] + _DIRECTIONS * (side / 2 + gap / 2 + away * side) - side / 2
                taken = np.array(list(found.values())).reshape(-1, 2)
                corner, line = _best(corners, taken, places, places[row], seen, room, side, gap)
                if corner is not None:
                    found[int(row)] = corner
                    seen = np.concatenate([seen, line])
                    break
    rows = sorted(found)
    return np.array(rows, dtype=np.int64), np.array([found[row] for row in rows]).reshape(-1, 2)


def _best(
    corners: Places,
    taken: Places,
    places: Places,
    place: Places,
    seen: Places,
    room: tuple[Places, Places],
    side: float,
    gap: float,
) -> tuple[Places | None, Places]:
    """The corner whose square hides the fewest points, None where none is free, and the line to it from its place."""
    free = ((corners >= room[0]) & (corners + side <= room[1])).all(1)
    free &= ~np.any(np.abs(corners[:, None] - taken).max(2, initial=0) < side + gap, axis=1)
    free &= _inside(seen, corners - gap / 2, side + gap).sum(1) == 0
    lines = place + (np.clip(place, corners, corners + side) - place)[:, None] * np.linspace(0, 1, 20)[:, None]
    free &= np.array([not _inside(line, taken, side).any() for line in lines])
    if not free.any():
        return None, np.empty((0, 2))
    hidden = np.where(free, _inside(places, corners, side).sum(1), len(places) + 1)
    best = int(hidden.argmin())
    return corners[best], lines[best]


def _inside(points: Places, corners: Places, side: float) -> npt.NDArray[np.bool_]:
    """(squares, points): which points (N, 2) lie in which squares, given by their lower left corners (n, 2)."""
    away = points - corners[:, None]
    return (away.min(2, initial=np.inf) >= 0) & (away.max(2, initial=0) <= side)


def _farthest_first(places: Places) -> Rows:
    """All rows: the one nearest to the middle, then always the one farthest from those before."""
    middle = (places.max(0) + places.min(0)) / 2
    order = [int(np.square(places - middle).sum(1).argmin())]
    nearest = np.full(len(places), np.inf)
    for _ in range(len(places) - 1):
        nearest = np.minimum(nearest, np.square(places - places[order[-1]]).sum(1))
        nearest[order] = -1
        order.append(int(nearest.argmax()))
    return np.array(order, dtype=np.int64)


def draw_thumbnails(
    axes: "Axes", places: Places, corners: Places, images: npt.NDArray[np.float32], side: float
) -> None:
    """The images (n, S, S, 3), each with its lower left corner at ``corners`` (n, 2) and a line to its place."""
    limits = axes.get_xlim(), axes.get_ylim()
    for place, corner, image in zip(places, corners, images, strict=True):
        (x, y), (to_x, to_y) = place, np.clip(place, corner, corner + side)
        axes.plot([x, to_x], [y, to_y], color=INK, linewidth=1, zorder=2)
        left, bottom = corner
        right, top = corner + side
        axes.imshow(image, extent=(left, right, bottom, top), zorder=3)
        frame = [left, right, right, left, left], [bottom, bottom, top, top, bottom]
        axes.plot(*frame, color=SOFT, linewidth=0.6, zorder=3.5)
    axes.scatter(*places.T, s=26, c=INK, edgecolors="white", linewidths=1, zorder=4)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
