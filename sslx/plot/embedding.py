"""A map of the features: t-SNE, or UMAP where umap-learn is installed."""

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

Places = npt.NDArray[np.float64]
Thumbnails = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
Projection = Literal["t-SNE", "UMAP"]
FEWEST = 4
"""Samples that make a map."""
MOST_NAMED = 20
"""Classes that a legend names."""
_WIDTH, _HEIGHT, _LEAST_HEIGHT = 8.0, 7.2, 3.6  # inches


def projection() -> Projection:
    """How features are mapped here: by UMAP where umap-learn is installed (the package ``umap`` is another one)."""
    return "UMAP" if any(metadata.distributions(name="umap-learn")) else "t-SNE"


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

    labels: (N,) int64, or None.  Each class has a color and a marker, of ten classes or fewer different from all
    others in both, and its name at the median of its points; more than twenty get neither names nor a legend.
    classes: their names; without them the labels' numbers.  thumbnails: given rows of features, their images as
    (n, S, S, 3) in [0, 1], shown beside some of the points.
    At most ``max_points`` samples are shown, each class by its share, drawn from ``seed``, which the map gets as well.
    Raises DataError for fewer than 4 samples.
    """
    rows = subsample(len(features), labels, max_points, seed)
    places, collapsed = _places(features[torch.from_numpy(rows)].double().numpy(), by, seed)
    subtitle = f"{by} of {len(rows):,}" + (f" of {len(features):,}" if len(rows) < len(features) else "")
    subtitle += " images" + (", whose features are all the same (collapsed)" if collapsed else "")
    figure, axes = canvas(_WIDTH, _HEIGHT)
    per_inch = _frame(figure, axes, places, 0.15 if thumbnails is None else SIDE + 2 * GAP)
    if labels is None:
        size = _size(len(rows))
        axes.scatter(*places.T, s=size, c=PALETTE[0], alpha=OPACITY, linewidths=0)
    else:
        subtitle += _draw_classes(axes, places, labels[torch.from_numpy(rows)].numpy(), classes, per_inch)
    if thumbnails is not None:
        chosen, corners = arrange(places, SIDE * per_inch, GAP * per_inch)
        draw_thumbnails(axes, places[chosen], corners, thumbnails(rows[chosen]), SIDE * per_inch)
        subtitle += f"; {len(chosen)} of them are shown beside their point"
    axes.axis("off")
    titles(axes, title, subtitle)
    save(figure, path)


def subsample(size: int, labels: Tensor | None, most: int, seed: int) -> npt.NDArray[np.int64]:
    """At most ``most`` of ``range(size)``, ascending; with labels each class by its share, at least one."""
    if size <= most:
        return np.arange(size)
    if labels is None:
        return np.sort(rng.permutation(seed, "plot", size=size)[:most])
    rows = rows_by_class(labels, seed, "plot").values()
    # Each row stands at its quantile within its class, so the first ones of the merged order are stratified.
    quantile = np.concatenate([(np.arange(len(r)) + 0.5) / len(r) for r in rows])
    first = np.concatenate([np.arange(len(r)) > 0 for r in rows])
    return np.sort(np.concatenate(list(rows))[np.lexsort((quantile, first))[:most]])


def _places(x: Places, by: Projection, seed: int) -> tuple[Places, bool]:
    """((N, 2) places on the map, whether all rows of x (N, D) are the same, of which there is no map)."""
    if len(x) < FEWEST:
        raise DataError(f"expected {FEWEST} or more images to map by {by}, got {len(x)}; give a folder of more images")
    if not np.ptp(x, axis=0).any():
        return np.zeros((len(x), 2)), True
    if by == "UMAP":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the seed, for which it takes one thread
            umap = import_module("umap").UMAP(n_neighbors=min(15, len(x) - 1), init="pca", random_state=seed)
            return np.asarray(umap.fit_transform(x), dtype=np.float64), False
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(x)
    return np.asarray(places, dtype=np.float64), False


def _frame(figure: "Figure", axes: "Axes", places: Places, border: float) -> float:
    """Make the canvas fit the map, with a border in inches, at one scale in both directions; units per inch."""
    low, high = places.min(0), places.max(0)
    room = np.array([_WIDTH, _HEIGHT]) - 2 * border
    per_inch = float(((high - low) / room).max()) or 1.0
    height = max(_LEAST_HEIGHT, float((high - low)[1]) / per_inch + 2 * border)
    figure.set_size_inches(_WIDTH, height)
    axes.set_position((0, 0, 1, 1))
    for set_limits, middle, inches in zip(
        (axes.set_xlim, axes.set_ylim), (low + high) / 2, (_WIDTH, height), strict=True
    ):
        set_limits(middle - inches * per_inch / 2, middle + inches * per_inch / 2)
    axes.set_aspect("equal")
    return per_inch


def _size(num: int) -> float:
    """Of a point, in square points of print."""
    return 26 * min(1.0, (800 / num) ** 0.5) + 4


def _draw_classes(
    axes: "Axes",
    places: Places,
    labels: npt.NDArray[np.int64],
    classes: Sequence[str] | None,
    per_inch: float,
) -> str:
    """The points in their class's color and marker, and the names; what is to be said of them."""
    present = np.unique(labels).tolist()
    look_of = dict(zip(present, looks(len(present)), strict=True))
    size = 1.3 * _size(len(labels))
    for label, (color, marker) in look_of.items():
        mine = places[labels == label]
        axes.scatter(*mine.T, s=size, c=color, marker=marker, alpha=OPACITY, linewidths=0)
    if len(present) > MOST_NAMED:
        return f", {len(present)} classes by color (too many for a legend)"
    names = {label: str(classes[label] if classes else label) for label in present}
    if np.ptp(places, axis=0).any():
        medians = np.array([np.median(places[labels == label], axis=0) for label in present])
        _draw_names(axes, [shown(names[label], 24) for label in present], medians, per_inch)
    legend(axes, {names[label]: look for label, look in look_of.items()})
    return ""


def _draw_names(axes: "Axes", names: Sequence[str], places: Places, per_inch: float) -> None:
    """The names at these places, moved apart where one would lie over another."""
    from matplotlib.patheffects import withStroke

    half = per_inch * np.array([[0.045 * len(name) + 0.05, 0.11] for name in names])
    places = places.copy()
    for _ in range(100):
        for i in range(len(places)):
            for j in range(i):
                away = places[i] - places[j]
                overlap = half[i] + half[j] - np.abs(away)
                if (overlap > 0).all():
                    step = 0.5 * overlap[1] * (1 if away[1] >= 0 else -1)
                    places[i, 1] += step
                    places[j, 1] -= step
    for name, place in zip(names, places, strict=True):
        halo = withStroke(linewidth=3, foreground="white", alpha=0.85)
        text = axes.text(float(place[0]), float(place[1]), name, fontsize=10, fontweight="bold", color=INK, zorder=5)
        text.set(ha="center", va="center", parse_math=False, path_effects=[halo])


def looks(num: int) -> list[tuple[str, str]]:
    """A color and a marker for each of so many classes."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_hex

    if num <= len(PALETTE):
        colors = list(PALETTE[:num])
    elif num <= 20:
        colors = [to_hex(colormaps["tab20"](i)) for i in range(num)]
    else:
        hues = np.arange(num) / num
        colors = [to_hex(tuple(hsv_to_rgb((h, 0.75, (0.95, 0.7, 0.5)[i % 3])))) for i, h in enumerate(hues)]
    return [(color, MARKERS[i % len(MARKERS)]) for i, color in enumerate(colors)]
