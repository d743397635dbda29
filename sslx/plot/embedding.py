"""Maps of the features by t-SNE and, if umap-learn is installed, by UMAP."""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import rng
from sslx.console.words import shown
from sslx.errors import DataError
from sslx.plot.canvas import INK, MARKERS, OPACITY, PALETTE, canvas, legend, save, titles
from sslx.plot.thumbnails import GAP, SIDE, arrange, draw_thumbnails
from sslx.probe.features import rows_by_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Positions = npt.NDArray[np.float64]
Thumbnails = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
Projection = Literal["t-SNE", "UMAP"]
MIN_SAMPLES = 4
"""Minimum number of samples for a map."""
MAX_NAMED_CLASSES = 20
"""Maximum number of classes for a map with names and a legend."""
_WIDTH, _MAX_HEIGHT, _MIN_HEIGHT = 8.0, 7.2, 3.6  # inches


def projections() -> tuple[Projection, ...]:
    """Return the available projections: UMAP needs umap-learn (not the unrelated package ``umap``)."""
    return ("t-SNE", "UMAP") if any(metadata.distributions(name="umap-learn")) else ("t-SNE",)


def feature_map(
    features: Tensor,
    labels: Tensor | None,
    classes: tuple[str, ...] | None,
    path: Path,
    title: str,
    *,
    thumbnails: Thumbnails | None = None,
    by: Projection = "t-SNE",
    max_points: int = 2000,
    seed: int = 0,
) -> None:
    """Write a PNG with a map of features (N, D), by t-SNE (JMLR 2008) or UMAP (arXiv 1802.03426).

    labels: (N,) int64, or None.  Each class has a color and a marker, and its name stands at the median of its points.
      Up to ten classes differ in both color and marker; more than twenty have neither names nor a legend.
    classes: names of the classes; by default their numbers are shown.
    thumbnails: returns the images of the given rows as (n, S, S, 3) in [0, 1].  Some are shown beside their points.
    max_points: maximum number of samples on the map, a stratified sample that is drawn with ``seed``.
    seed: of that sample and of the projection.
    Raises DataError for fewer than 4 samples.
    """
    rows = subsample(len(features), labels, max_points, seed)
    positions, is_collapsed = _project(features[torch.from_numpy(rows)].double().numpy(), by, seed)
    subtitle = f"{by} of {len(rows):,}"
    if len(rows) < len(features):
        subtitle += f" of {len(features):,}"
    subtitle += " images"
    if is_collapsed:
        subtitle += ", whose features are all the same (collapsed)"
    figure, axes = canvas(_WIDTH, _MAX_HEIGHT)
    per_inch = _fit_canvas(figure, axes, positions, 0.15 if thumbnails is None else SIDE + 2 * GAP)
    if labels is None:
        size = _marker_area(len(rows))
        axes.scatter(*positions.T, s=size, c=PALETTE[0], alpha=OPACITY, linewidths=0)
    else:
        subtitle += _draw_classes(axes, positions, labels[torch.from_numpy(rows)].numpy(), classes, per_inch)
    if thumbnails is not None:
        chosen, corners = arrange(positions, SIDE * per_inch, GAP * per_inch)
        draw_thumbnails(axes, positions[chosen], corners, thumbnails(rows[chosen]), SIDE * per_inch)
        subtitle += f"; {len(chosen)} of them are shown beside their points"
    axes.axis("off")
    titles(axes, title, subtitle)
    save(figure, path)


def subsample(size: int, labels: Tensor | None, max_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Return a random sample of at most ``max_rows`` of ``range(size)``, ascending.

    With labels, the sample is stratified by class and has at least one row of each class.
    """
    if size <= max_rows:
        return np.arange(size)
    if labels is None:
        return np.sort(rng.permutation(seed, "plot", size=size)[:max_rows])
    rows = rows_by_class(labels, seed, "plot").values()
    # Sorting by the quantile within the class stratifies every beginning of the order.
    quantile = np.concatenate([(np.arange(len(r)) + 0.5) / len(r) for r in rows])
    is_not_first = np.concatenate([np.arange(len(r)) > 0 for r in rows])
    return np.sort(np.concatenate(list(rows))[np.lexsort((quantile, is_not_first))[:max_rows]])


def _project(x: Positions, by: Projection, seed: int) -> tuple[Positions, bool]:
    """Return positions (N, 2) on the map, and whether all rows of x (N, D) are the same, which cannot be mapped."""
    if len(x) < MIN_SAMPLES:
        raise DataError(
            f"expected {MIN_SAMPLES} or more images to map by {by}, got {len(x)}: use a folder of more images"
        )
    if not np.ptp(x, axis=0).any():
        return np.zeros((len(x), 2)), True
    if by == "UMAP":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # UMAP warns that a seed limits it to one thread
            umap = import_module("umap").UMAP(n_neighbors=min(15, len(x) - 1), init="pca", random_state=seed)
            return np.asarray(umap.fit_transform(x), dtype=np.float64), False
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    positions = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
    return np.asarray(positions, dtype=np.float64), False


def _fit_canvas(figure: "Figure", axes: "Axes", positions: Positions, border: float) -> float:
    """Fit the canvas to the map, with the same scale in both directions, and return the map's units per inch.

    border: in inches.
    """
    low, high = positions.min(0), positions.max(0)
    room = np.array([_WIDTH, _MAX_HEIGHT]) - 2 * border
    per_inch = float(((high - low) / room).max()) or 1.0
    height = max(_MIN_HEIGHT, float((high - low)[1]) / per_inch + 2 * border)
    figure.set_size_inches(_WIDTH, height)
    axes.set_position((0, 0, 1, 1))
    for set_limits, middle, inches in zip(
        (axes.set_xlim, axes.set_ylim), (low + high) / 2, (_WIDTH, height), strict=True
    ):
        set_limits(middle - inches * per_inch / 2, middle + inches * per_inch / 2)
    axes.set_aspect("equal")
    return per_inch


def _marker_area(num_points: int) -> float:
    """Return the area of a marker in square typographic points."""
    return 26 * min(1.0, (800 / num_points) ** 0.5) + 4


def _draw_classes(
    axes: "Axes",
    positions: Positions,
    labels: npt.NDArray[np.int64],
    classes: Sequence[str] | None,
    per_inch: float,
) -> str:
    """Draw the points in their class's color and marker, and the classes' names; return a note for the subtitle."""
    unique = np.unique(labels).tolist()
    styles = dict(zip(unique, class_styles(len(unique)), strict=True))
    size = 1.3 * _marker_area(len(labels))
    for label, (color, marker) in styles.items():
        points = positions[labels == label]
        axes.scatter(*points.T, s=size, c=color, marker=marker, alpha=OPACITY, linewidths=0)
    if len(unique) > MAX_NAMED_CLASSES:
        return f", {len(unique)} classes by color (too many for a legend)"
    names = {label: str(classes[label] if classes else label) for label in unique}
    if np.ptp(positions, axis=0).any():
        medians = np.array([np.median(positions[labels == label], axis=0) for label in unique])
        _draw_names(axes, [shown(names[label], 24) for label in unique], medians, per_inch)
    legend(axes, {names[label]: style for label, style in styles.items()})
    return ""


def _draw_names(axes: "Axes", names: Sequence[str], positions: Positions, per_inch: float) -> None:
    """Write names at the given positions, moved apart vertically where they would overlap."""
    from matplotlib.patheffects import withStroke

    half_sizes = per_inch * np.array([[0.045 * len(name) + 0.05, 0.11] for name in names])
    positions = positions.copy()
    for _ in range(100):
        for i in range(len(positions)):
            for j in range(i):
                offset = positions[i] - positions[j]
                overlap = half_sizes[i] + half_sizes[j] - np.abs(offset)
                if (overlap > 0).all():
                    step = 0.5 * overlap[1] * (1 if offset[1] >= 0 else -1)
                    positions[i, 1] += step
                    positions[j, 1] -= step
    for name, (x, y) in zip(names, positions.tolist(), strict=True):
        halo = withStroke(linewidth=3, foreground="white", alpha=0.85)
        text = axes.text(x, y, name, fontsize=10, fontweight="bold", color=INK, zorder=5)
        text.set(ha="center", va="center", parse_math=False, path_effects=[halo])


def class_styles(num_classes: int) -> list[tuple[str, str]]:
    """Return a (color, marker) for each class."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_hex

    if num_classes <= len(PALETTE):
        colors = list(PALETTE[:num_classes])
    elif num_classes <= 20:
        colors = [to_hex(colormaps["tab20"](i)) for i in range(num_classes)]
    else:
        hues = np.arange(num_classes) / num_classes
        colors = [to_hex(tuple(hsv_to_rgb((h, 0.75, (0.95, 0.7, 0.5)[i % 3])))) for i, h in enumerate(hues)]
    return [(color, MARKERS[i % len(MARKERS)]) for i, color in enumerate(colors)]
