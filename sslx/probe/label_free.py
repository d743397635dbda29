"""What can be said of a representation without labels: rank, spread, alignment, uniformity, instance retrieval."""

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

MOST = 2_000
"""Images to look at: rank and uniformity grow with their square, and numbers compare only between equally many."""
_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a representation of ``dim`` dimensions makes of ``num_images`` images.

    rank: RankMe (``geometry.rank_me``) of the images as probes see them; None: not computed.  std: of the same, their
    spread (``losses.spread``).  alignment, uniformity: of pairs of augmented views, as ``health`` computes them.
    retrieval: the share, in [0, 1], of augmented views that are nearest to the image that they are made of.
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
    """The scores of features (N, D): of images as probes see them, and of two augmented views of each.

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
    """The share of queries (N, D) whose nearest of the keys (N, D), by cosine similarity, is that of the same row.

    Where several are equally near, the lowest row is the nearest: of features that are all alike, 1 / N.
    """
    unit = F.normalize(keys.double(), dim=1)
    rows = max(1, _CHUNK_BYTES // (8 * len(unit)))
    found = [nearest(F.normalize(part.double(), dim=1) @ unit.T, 1)[1][:, 0] for part in queries.split(rows)]
    return float((torch.cat(found) == torch.arange(len(queries))).double().mean())


def table(scores: Sequence[Score]) -> Table:
    """One row a representation."""
    drawn = Table()
    drawn.add_column("representation")
    for head in ("rank", "std", "alignment", "uniformity", "retrieval"):
        drawn.add_column(head, justify="right")
    for row in scores:
        rank = "" if row.rank is None else f"{row.rank:.1f} of {min(row.dim, row.num_images):,}"
        numbers = (f"{row.std:.2f}", f"{row.alignment:.2f}", f"{row.uniformity:.2f}", f"{100 * row.retrieval:.1f} %")
        drawn.add_row(Text(shown(row.name)), rank, *numbers)
    return drawn


def meanings(num_images: int) -> tuple[str, ...]:
    """What each column means and which direction is good, a line each."""
    return (
        "rank: directions that the features use (RankMe), of as many as there could be; higher is better",
        "std: how far apart the features point; 1 is good, near 0 they have collapsed: all images look the same",
        "alignment: squared distance between two augmented views of an image; lower is better, if std is high",
        "uniformity: how evenly the features cover the sphere; lower is better, 0 is collapse",
        f"retrieval: augmented views that find their own image among {num_images:,} "
        f"({100 / num_images:.2g} % by chance); higher is better",
    )


def as_json(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The scores as JSON can hold them."""
    return [dataclasses.asdict(row) for row in scores]
