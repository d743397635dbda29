"""Sheets of images: rows of the same images, and images with their nearest neighbors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from sslx import rng
from sslx.console.words import shown
from sslx.data.views import ViewSpec
from sslx.errors import DataError
from sslx.plot.canvas import INK, canvas, save, titles
from sslx.probe.knn import nearest

Pixels = npt.NDArray[np.float32]


def rgb(images: Tensor, view: ViewSpec) -> Pixels:
    """Images (B, 3, H, W), normalized with the view's mean and std, as (B, H, W, 3) in [0, 1], the rest cut off."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def images(rows: Sequence[tuple[str, Tensor]], view: ViewSpec, path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of rows of images, each with its name: the same B samples in every row, one below the other.

    rows: of (B, 3, H, W) images, normalized with the view's mean and std; what is outside of [0, 1] then is cut off.
    All rows have one scale, so that images of fewer pixels are smaller.  Small images are enlarged pixel by pixel.
    """
    gap, num = 0.06, len(rows[0][1])  # in images
    most = max(max(samples.shape[2:]) for _, samples in rows)
    heights = [samples.shape[2] / most for _, samples in rows]
    tops = np.cumsum([0.0, *(height + gap for height in heights)])
    figure, axes = canvas(1.5 * num, 1.5 * tops[-1])
    for top, height, (_, samples) in zip(tops[:-1], heights, rows, strict=True):
        for column, image in enumerate(rgb(samples, view)):
            left = (1 + gap) * column
            axes.imshow(image, extent=(left, left + image.shape[1] / most, top + height, top))
    axes.set_xlim(0, (1 + gap) * num - gap)
    axes.set_ylim(tops[-1] - gap, 0)
    axes.set_xticks([])
    middles = [top + height / 2 for top, height in zip(tops[:-1], heights, strict=True)]
    axes.set_yticks(middles, [shown(name, 60) for name, _ in rows], parse_math=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    titles(axes, title, subtitle, above=10)
    save(figure, path)


def side_by_side(views: Sequence[Tensor], view: ViewSpec, width: int) -> Tensor:
    """Views (B, 3, S, S), normalized with the view's mean and std, as one (B, 3, S, width), white between them."""
    samples, channels, side, _ = views[0].shape
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    sheet = ((1 - mean) / std).expand(samples, channels, side, width).clone()
    for number, each in enumerate(views):
        left = number * width // len(views)
        sheet[..., left : left + side] = each.float().cpu()
    return sheet


def neighbors(
    features: Tensor, num_queries: int, num_neighbors: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows of features (N, D) that lie far apart, (Q,), and of each the nearest others and how similar, (Q, K).

    By cosine similarity, the nearest first; the lower row of equals.  The first query is drawn from the seed, each
    further one with a probability that grows with the squared distance to those before (k-means++, SODA 2007).  Q and K
    are smaller where there are fewer rows.  Raises DataError for fewer than 2.
    """
    if len(features) < 2:
        raise DataError(f"expected 2 or more images to look for neighbors among, got {len(features)}")
    unit = F.normalize(features.double(), dim=1)
    drawn = rng.uniform(seed, "neighbors", np.arange(num_queries), num=1)[:, 0]
    queries = [int(drawn[0] * len(unit))]
    distance = 1 - unit @ unit[queries[0]]
    for u in drawn[1 : min(num_queries, len(unit))]:
        weights = distance.clamp_min(1e-9)  # also where all are alike
        weights[queries] = 0
        total = weights.cumsum(0)
        queries.append(int(torch.searchsorted(total, u * total[-1], right=True).clamp_max(len(unit) - 1)))
        distance = torch.minimum(distance, 1 - unit @ unit[queries[-1]])
    rows = torch.tensor(queries)
    similarity = unit[rows] @ unit.T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    values, columns = nearest(similarity, min(num_neighbors, len(unit) - 1))
    return rows.numpy(), columns.numpy(), values.numpy()


def neighbor_sheet(rows: Sequence[tuple[Pixels, Sequence[str]]], path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of rows of images with a line below each; the first of a row, the query, is framed.

    rows: images (1 + K, H, W, 3) in [0, 1] and the 1 + K lines.
    """
    gap, apart, below = 0.1, 0.25, 0.3  # in images
    num = len(rows[0][1])
    width, height = num * (1 + gap) + apart, len(rows) * (1 + below)
    figure, axes = canvas(1.25 * width, 1.25 * height)
    axes.set_position((0, 0, 1, 1))
    for row, (pixels, lines) in enumerate(rows):
        top = row * (1 + below)
        for column, (image, line) in enumerate(zip(pixels, lines, strict=True)):
            left = column * (1 + gap) + apart * (column > 0)
            axes.imshow(image, extent=(left, left + 1, top + 1, top))
            axes.text(
                left + 0.5, top + 1.05, shown(line, 18), ha="center", va="top", fontsize=8, color=INK, parse_math=False
            )
        axes.plot([0, 1, 1, 0, 0], [top, top, top + 1, top + 1, top], color=INK, linewidth=3, clip_on=False)
    axes.set_xlim(-0.03, width - gap)
    axes.set_ylim(height, -0.03)
    axes.axis("off")
    titles(axes, title, subtitle, above=10)
    save(figure, path)
