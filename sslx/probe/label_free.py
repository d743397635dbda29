"""Scores of a representation that need no labels: rank, std, alignment, uniformity and instance retrieval."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from sslx.console.words import shown
from sslx.errors import DataError
from sslx.losses import spread
from sslx.probe import geometry
from sslx.probe.knn import nearest

MAX_IMAGES = 2_000
"""Maximum number of images to score.  The cost of rank and uniformity grows with the square of this number, and scores
are only comparable between equal numbers of images."""
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scores of one representation with ``dim`` dimensions on ``num_images`` images.

    rank: RankMe (``geometry.rank_me``) of the images' features with the probes' view, or None if not computed.
    std: spread of the same features (``losses.spread``).
    alignment, uniformity: of two augmented views of each image, as ``monitor.health`` computes them.
    retrieval: fraction, in [0, 1], of augmented views whose nearest image is the one that they were made from.
    """

    name: str
    dim: int
    num_images: int
    rank: float | None
    std: float
    alignment: float
    uniformity: float
    retrieval: float


def score(name: str, plain: Tensor, first: Tensor, second: Tensor, *, with_rank: bool = True) -> Score:
    """Score the features (N, D) of N images.

    plain: features of the images with the probes' view.  first, second: features of two augmented views of each image.
    Raises DataError for fewer than 2 images.
    """
    if len(plain) < 2:
        raise DataError(f"expected 2 or more images to tell apart, got {len(plain)}")
    return Score(
        name=name,
        dim=plain.shape[1],
        num_images=len(plain),
        rank=float(geometry.rank_me(plain)) if with_rank else None,
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


def table(scores: Sequence[Score]) -> Table:
    """Return a table with one row for each representation."""
    columns = Table()
    columns.add_column("representation")
    for head in ("rank", "std", "alignment", "uniformity", "retrieval"):
        columns.add_column(head, justify="right")
    for row in scores:
        rank = "" if row.rank is None else f"{row.rank:.1f} of {min(row.dim, row.num_images):,}"
        numbers = (f"{row.std:.2f}", f"{row.alignment:.2f}", f"{row.uniformity:.2f}", f"{100 * row.retrieval:.1f} %")
        columns.add_row(Text(shown(row.name)), rank, *numbers)
    return columns


def legend(num_images: int) -> tuple[str, ...]:
    """Return one line for each column of the table, on its meaning and on which direction is better."""
    return (
        "rank: number of directions that the features use (RankMe), of the possible number; higher is better",
        "std: how far apart the features point; 1 is good, and near 0 they have collapsed: all images look the same",
        "alignment: squared distance between two augmented views of an image; lower is better, if std is high",
        "uniformity: how evenly the features cover the sphere; lower is better, and 0 is a collapse",
        f"retrieval: augmented views that find their own image among {num_images:,} "
        f"({100 / num_images:.2g} % by chance); higher is better",
    )


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the scores as values that JSON can hold."""
    return [dataclasses.asdict(row) for row in scores]
