"""A picture of a confusion matrix: with names and numbers for few classes, with a list of the largest for many."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sslx.console.words import plural, shown
from sslx.plot.canvas import GRAY, INK, PALETTE, SOFT, canvas, save, titles
from sslx.probe.confusion import Confusion, Saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_NAMED_CLASSES = 30
"""Maximum number of classes with names and numbers."""
NUM_LISTED = 12
"""Number of confusions in the list below the matrix of more classes."""
_MAX_CELLS = 500
"""Maximum number of rows of the picture; a row of more classes than that stands for several neighbors."""


def confusion_matrix(saved: Saved, path: Path, name: str) -> None:
    """Write a PNG of a confusion matrix, whose rows are classes and whose columns are predicted classes.

    A cell's color is its share of the images of its row, on a square-root scale, so that rare confusions are visible.
    name: of the run, for the title.
    """
    confusion, num_classes = saved.confusion, len(saved.classes)
    cells = shares(confusion, num_classes)
    has_names = num_classes <= MAX_NAMED_CLASSES
    side = max(6.0, 0.36 * num_classes * has_names)
    figure, axes = canvas(side, side)
    _draw_matrix(axes, cells)
    if has_names:
        _draw_names(axes, saved, cells)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        _draw_list(axes, saved)
    axes.set_xlabel("predicted class", color=SOFT, labelpad=8)
    axes.set_ylabel("class", color=SOFT, labelpad=8)
    titles(
        axes,
        f"{name}: confusions of the {confusion.classifier} classifier",
        f"{plural(confusion.num_images, f'{saved.split} image')} of {saved.source}, step {saved.step:,}, accuracy "
        f"{100 * confusion.accuracy:.1f} %"
        + ("; numbers are % of a class" if has_names else f"; {num_classes} classes"),
        above=10,
    )
    save(figure, path)


def shares(confusion: Confusion, num_classes: int) -> npt.NDArray[np.float64]:
    """Return the matrix (S, S) with the share of each row's images in its cells; rows without images are NaN.

    S is the number of classes, but at most 500; then each row and column stands for neighboring classes.
    """
    size = min(num_classes, _MAX_CELLS)
    cells = np.zeros((size, size))
    rows, columns = (confusion.counts[:, i] * size // num_classes for i in (0, 1))
    np.add.at(cells, (rows, columns), confusion.counts[:, 2])
    totals = cells.sum(1, keepdims=True)
    return np.divide(cells, totals, out=np.full_like(cells, np.nan), where=totals > 0)


def largest(confusion: Confusion, num: int) -> list[tuple[int, int, int, int]]:
    """Return the most frequent confusions: (class, predicted class, number of images, number of the class's images)."""
    counts = confusion.counts
    wrong = counts[counts[:, 0] != counts[:, 1]]
    wrong = wrong[np.lexsort((wrong[:, 1], wrong[:, 0], -wrong[:, 2]))][:num]
    return [(a, b, n, int(counts[counts[:, 0] == a, 2].sum())) for a, b, n in wrong.tolist()]


def _draw_matrix(axes: "Axes", cells: npt.NDArray[np.float64]) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colors = LinearSegmentedColormap.from_list("shares", ["#ffffff", PALETTE[0], PALETTE[9]])
    axes.imshow(cells, cmap=colors.with_extremes(bad=GRAY), norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(GRAY)


def _draw_names(axes: "Axes", saved: Saved, cells: npt.NDArray[np.float64]) -> None:
    """Write the classes' names beside the rows and below the columns, and the shares in % into the cells."""
    names = [shown(name, 20) for name in saved.classes]
    places = range(len(names))
    axes.set_yticks(places, names, parse_math=False, fontsize=9)
    turned = max(map(len, names)) > 2
    axes.set_xticks(places, names, parse_math=False, fontsize=9, rotation=90 if turned else 0, ha="center")
    for row, column in np.argwhere(np.nan_to_num(cells) > 0).tolist():
        share = cells[row, column]
        text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 0.2 else INK)


def _draw_list(axes: "Axes", saved: Saved) -> None:
    """Write the largest confusions below the matrix."""
    found = largest(saved.confusion, NUM_LISTED)
    lines = [
        f"{shown(saved.classes[a], 24)} taken for {shown(saved.classes[b], 24)}: {n} of {total}"
        for a, b, n, total in found
    ]
    for number, line in enumerate(["Largest confusions, in images" if lines else "No confusions", *lines]):
        axes.annotate(
            line,
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -36 - 15 * number),
            textcoords="offset points",
            fontsize=10,
            fontweight="normal" if number else "bold",
            color=INK,
            parse_math=False,
        )
