"""Sheets of images: several views of the same images, or images with their nearest neighbors."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
from sslx.plot.canvas import GRAY, INK, SOFT, canvas, save, titles
from sslx.probe.knn import nearest

Pixels = npt.NDArray[np.float32]
_SHOWN = 2.5
"""Standard deviations to each side of the mean that black and white are in pictures of images that are not RGB."""


def rgb(images: Tensor, view: ViewSpec) -> Pixels:
    """Convert images (B, C, H, W), normalized by the view's mean and std, to (B, H, W, 3), clipped to [0, 1].

    Of images that are not RGB, the first three channels become red, green and blue, or the first one gray; each shows
    the values that are within 2.5 standard deviations of its mean.
    """
    if not view.channels.is_rgb:
        chosen = images[:, :3] if view.channels.num >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        return (chosen.float().cpu() / (2 * _SHOWN) + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    return (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def drawn_channels(view: ViewSpec) -> str:
    """Return the end of a caption that says how images that are not RGB are drawn, or ""."""
    num = view.channels.num
    if view.channels.is_rgb:
        return ""
    drawn = "shown in gray" if num == 1 else "of which the first is shown in gray"
    if num >= 3:
        drawn = "of which 1 to 3 are shown as red, green and blue"
    return f"; {num} channel{'s' * (num > 1)}, {drawn}, each scaled by its standard deviation"


def images(rows: Sequence[tuple[str, Tensor]], view: ViewSpec, path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of named rows of images, with the same B samples in the columns of every row.

    rows: names and images (B, C, H, W), normalized by the view's mean and std.  Values outside [0, 1] are clipped.
    All rows have the same scale, so images with fewer pixels are smaller.  Pixels are enlarged without interpolation.
    """
    gap, num_columns = 0.06, len(rows[0][1])  # lengths are in units of the largest image
    max_px = max(max(samples.shape[2:]) for _, samples in rows)
    heights = [samples.shape[2] / max_px for _, samples in rows]
    tops = np.cumsum([0.0, *(height + gap for height in heights)])
    figure, axes = canvas(1.5 * num_columns, 1.5 * tops[-1])
    for top, height, (_, samples) in zip(tops[:-1], heights, rows, strict=True):
        for column, image in enumerate(rgb(samples, view)):
            left = (1 + gap) * column
            axes.imshow(image, extent=(left, left + image.shape[1] / max_px, top + height, top))
    axes.set_xlim(0, (1 + gap) * num_columns - gap)
    axes.set_ylim(tops[-1] - gap, 0)
    axes.set_xticks([])
    middles = [top + height / 2 for top, height in zip(tops[:-1], heights, strict=True)]
    axes.set_yticks(middles, [shown(name, 60) for name, _ in rows], parse_math=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    titles(axes, title, subtitle, above=10)
    save(figure, path)


@dataclass(frozen=True)
class Row:
    """A row of a sheet: a name, a line about it, and images (B, H, W, 3) in [0, 1]."""

    name: str
    detail: str
    pixels: Pixels


def sections(parts: Sequence[tuple[str, Sequence[Row]]], path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of rows of images in sections with headings, the same samples in the columns of every row.

    All rows have the same scale, as in ``images``.
    """
    gap, heading, names = 0.08, 0.42, 2.1  # lengths are in units of the largest image
    every = [row for _, rows in parts for row in rows]
    num_columns, max_px = max(len(row.pixels) for row in every), max(max(row.pixels.shape[1:3]) for row in every)
    width = names + num_columns * (1 + gap) - gap
    height = sum(heading + sum(row.pixels.shape[1] / max_px + gap for row in rows) for _, rows in parts)
    figure, axes = canvas(1.15 * width, 1.15 * height)
    axes.set_position((0, 0, 1, 1))
    top = 0.0
    for name, rows in parts:
        axes.plot([0, width], [top + heading - 0.1] * 2, color=GRAY, linewidth=1, zorder=0)
        axes.text(0, top + heading - 0.15, name, va="bottom", fontsize=11, fontweight="bold", color=INK)
        top += heading
        for row in rows:
            side = row.pixels.shape[1] / max_px
            middle, lines = top + side / 2, textwrap.wrap(row.detail, 32)
            axes.text(0, middle - 0.02, shown(row.name, 30), va="bottom", fontsize=9.5, color=INK, parse_math=False)
            axes.text(0, middle + 0.03, "\n".join(lines), va="top", fontsize=7.5, color=SOFT, parse_math=False)
            for column, image in enumerate(row.pixels):
                left = names + column * (1 + gap)
                extent = (left, left + image.shape[1] / max_px, top + side, top)
                axes.imshow(image, extent=extent, interpolation="nearest" if max_px <= 64 else "auto")
            top += side + gap
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    titles(axes, title, subtitle, above=10)
    save(figure, path)


def side_by_side(views: Sequence[Tensor], view: ViewSpec, width: int) -> Tensor:
    """Join views (B, C, S, S), normalized by the view's mean and std, to (B, C, S, width) with white between them."""
    num_samples, channels, side, _ = views[0].shape
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (view.mean, view.std))
    white = (1 - mean) / std if view.channels.is_rgb else torch.full((channels, 1, 1), _SHOWN)
    sheet = white.expand(num_samples, channels, side, width).clone()
    for i, samples in enumerate(views):
        left = i * width // len(views)
        sheet[..., left : left + side] = samples.float().cpu()
    return sheet


def neighbors(
    features: Tensor, num_queries: int, num_neighbors: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Choose query rows of features (N, D) that lie far apart, and find their nearest neighbors by cosine similarity.

    Returns queries (Q,), and for each its neighbors and their similarities, both (Q, K), nearest first; of equals the
    lower row.  Q and K are smaller than ``num_queries`` and ``num_neighbors`` if there are fewer rows.
    The first query is drawn uniformly, and each further one with a probability proportional to the squared distance to
    the nearest query before it (k-means++, SODA 2007).  Raises DataError for fewer than 2 rows.
    """
    if len(features) < 2:
        raise DataError(
            f"expected 2 or more images to find neighbors, got {len(features)}: use a folder of more images"
        )
    unit = F.normalize(features.double(), dim=1)
    draws = rng.uniform(seed, "neighbors", np.arange(num_queries), num=1)[:, 0]
    queries = [int(draws[0] * len(unit))]
    distance = 1 - unit @ unit[queries[0]]
    for draw in draws[1 : min(num_queries, len(unit))]:
        weights = distance.clamp_min(1e-9)  # positive even if all rows are equal
        weights[queries] = 0
        cumulative = weights.cumsum(0)
        query = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp_max(len(unit) - 1)
        queries.append(int(query))
        distance = torch.minimum(distance, 1 - unit @ unit[queries[-1]])
    rows = torch.tensor(queries)
    similarity = unit[rows] @ unit.T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    values, columns = nearest(similarity, min(num_neighbors, len(unit) - 1))
    return rows.numpy(), columns.numpy(), values.numpy()


def neighbor_sheet(rows: Sequence[tuple[Pixels, Sequence[str]]], path: Path, title: str, subtitle: str) -> None:
    """Write a PNG of rows of images with a line of text below each image.  The first image of a row is framed.

    rows: 1 + K images (1 + K, H, W, 3) in [0, 1] and their 1 + K lines; K may differ.
    """
    gap, query_gap, line_height = 0.1, 0.25, 0.3  # in units of an image
    num_columns = max(len(lines) for _, lines in rows)
    width, height = num_columns * (1 + gap) + query_gap, len(rows) * (1 + line_height)
    figure, axes = canvas(1.25 * width, 1.25 * height)
    axes.set_position((0, 0, 1, 1))
    for row, (pixels, lines) in enumerate(rows):
        top = row * (1 + line_height)
        for column, (image, line) in enumerate(zip(pixels, lines, strict=True)):
            left = column * (1 + gap)
            if column > 0:
                left += query_gap
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
