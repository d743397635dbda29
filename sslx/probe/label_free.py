"""Scores of a representation that need no labels: ranks, std, alignment, uniformity and instance retrieval."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx.errors import DataError
from sslx.losses import spread
from sslx.probe import geometry
from sslx.probe.knn import nearest
from sslx.probe.tables import Column

MAX_IMAGES = 2_000
"""Maximum number of images to score.  The cost of rank and uniformity grows with the square of this number, and scores
are only comparable between equal numbers of images."""
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scores of one representation with ``dim`` dimensions on ``num_images`` images.

    rank: RankMe (``geometry.rank_me``) of the images' features with the probes' view, or None if not computed.
    alpha: alpha-ReQ (``geometry.alpha_req``) of the same features; None also if they have too few dimensions.
    std: spread of the same features (``losses.spread``).
    lidar: LiDAR (``geometry.lidar``) of ``num_views`` augmented views of each image, or None if not computed.
    alignment, uniformity: of the first two augmented views of each image, as ``monitor.health`` computes them.
    retrieval: fraction, in [0, 1], of augmented views whose nearest image is the one that they were made from.
    """

    name: str
    dim: int
    num_images: int
    num_views: int
    rank: float | None
    lidar: float | None
    alpha: float | None
    std: float
    alignment: float
    uniformity: float
    retrieval: float


def score(name: str, plain: Tensor, views: Tensor, *, with_ranks: bool = True) -> Score:
    """Score the features of N images.

    plain: (N, D), with the probes' view.  views: (N, V, D), of V augmented views of each image, 2 or more.
    with_ranks: compute RankMe, LiDAR and alpha-ReQ, which say nothing of raw pixels.
    Raises DataError for fewer than 2 images.
    """
    if len(plain) < 2:
        raise DataError(f"expected 2 or more images to tell apart, got {len(plain)}")
    first, second = views[:, 0], views[:, 1]
    alpha = float(geometry.alpha_req(plain)) if with_ranks else math.nan
    return Score(
        name=name,
        dim=plain.shape[1],
        num_images=len(plain),
        num_views=views.shape[1],
        rank=float(geometry.rank_me(plain)) if with_ranks else None,
        lidar=float(geometry.lidar(views)) if with_ranks else None,
        alpha=alpha if math.isfinite(alpha) else None,
        std=float(spread(plain)),
        alignment=float(geometry.alignment(first.double(), second.double())),
        uniformity=float(geometry.uniformity(first.double())),
        retrieval=retrieval(first, plain),
    )


def retrieval(queries: Tensor, keys: Tensor) -> float:
    """Return the fraction of queries (N, D) whose nearest key (N, D), by cosine similarity, has the same row.

    Of several equally near keys the lowest row counts, so the result is 1 / N if all keys are equal.
    """
    unit = F.normalize(keys.double(), dim=1)
    rows_per_block = max(1, _BLOCK_BYTES // (8 * len(unit)))
    blocks = queries.split(rows_per_block)
    nearest_rows = torch.cat([nearest(F.normalize(block.double(), dim=1) @ unit.T, 1)[1][:, 0] for block in blocks])
    return float((nearest_rows == torch.arange(len(queries))).double().mean())


def columns(scores: Sequence[Score | None]) -> list[list[Column]]:
    """Return groups of columns with the scores, one cell for each; empty cells for None."""

    def cells(cell: Callable[[Score], str]) -> list[tuple[float | None, str]]:
        return [(None, "" if score is None else cell(score)) for score in scores]

    def optional(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    variance = [
        ("rank", cells(lambda s: optional(s.rank, "{:.1f}/" + str(min(s.dim, s.num_images))))),
        ("LiDAR", cells(lambda s: optional(s.lidar, "{:.1f}"))),
        ("alpha", cells(lambda s: optional(s.alpha, "{:.2f}"))),
        ("std", cells(lambda s: f"{s.std:.2f}")),
    ]
    views = [
        ("alignment", cells(lambda s: f"{s.alignment:.2f}")),
        ("uniformity", cells(lambda s: f"{s.uniformity:.2f}")),
        ("retrieval", cells(lambda s: f"{100 * s.retrieval:.1f} %")),
    ]
    return [variance, views]


def legend(num_images: int) -> tuple[str, ...]:
    """Return one line for each column of the table, on its meaning and on which direction is better."""
    return (
        "rank: number of directions that the features use (RankMe), of the possible number; higher is better",
        "LiDAR: number of directions that tell images apart and not views of an image; higher is better",
        "alpha: how fast the directions' variances decay (alpha-ReQ); near 1 is best",
        "std: how far apart the features point; 1 is good, and near 0 they have collapsed: all images look the same",
        "alignment: squared distance between two augmented views of an image; lower is better, if std is high",
        "uniformity: how evenly the features cover the sphere; lower is better, and 0 is a collapse",
        f"retrieval: augmented views that find their own image among {num_images:,} "
        f"({100 / num_images:.2g} % by chance); higher is better",
    )


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as values that JSON can hold."""
    return [dataclasses.asdict(row) for row in scores]
