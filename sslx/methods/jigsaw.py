"""Jigsaw (Noroozi & Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
arXiv 1603.09246).

One view of each image is cut into 3x3 tiles, which are put in the order of one of a fixed set of permutations.  Each
tile goes through the encoder alone (the context-free network); a classifier over all nine says which permutation it
was.  Gaps between the tiles and their own normalization keep edges and low-level statistics from giving it away.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import encoders
from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base
from sslx.methods.config import MethodConfig

GRID = 3
NUM_TILES = GRID * GRID
EPSILON = 1e-5
"""Added to a tile's variance, which may be 0."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The permutations and the widths of the context-free network; the defaults are the paper's for ImageNet."""

    num_views: ClassVar = 1  # the paper's has 225 px and is gray in 30 % of images (``augment.gray``)
    name: Literal["jigsaw"] = "jigsaw"
    num_permutations: int = 1000
    """Number of permutations to tell apart: the largest in the paper's table 4, and that of its code."""
    tile_dim: int = 512
    """Width of the layer that all tiles share (fc6)."""
    hidden_dim: int = 4096
    """Width of the classifier's hidden layer, over all tiles (fc7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_permutations", least=2, most=math.factorial(NUM_TILES))

    def build(self, encoder: Encoder) -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, a layer that all tiles share, and a classifier of permutations.

    Deviations from the paper and its code: any encoder in place of AlexNet's convolutions, no dropout after the two
    hidden layers, and no shifts of the color channels against one another.
    """

    permutations: Tensor  # (num_permutations, 9) int64; in no checkpoint, because it follows from the config

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        side = tile_side(encoder.size)
        if not encoders.accepts_size(encoder, side):
            raise ConfigError(
                f"jigsaw cuts views of {encoder.size} px into tiles of {side} px, which {type(encoder.trunk).__name__} "
                "does not accept: use a ResNet or a larger --data.size"
            )
        self.config = config
        self.tile_head = nn.Sequential(nn.Linear(encoder.dim, config.tile_dim), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(
            nn.Linear(NUM_TILES * config.tile_dim, config.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden_dim, config.num_permutations),
        )
        permutations = torch.tensor(distant_permutations(config.num_permutations, NUM_TILES))
        self.register_buffer("permutations", permutations, persistent=False)

    def draw(self, draws: Draws) -> tuple[npt.NDArray[Any], ...]:
        """Return the number of each image's permutation, (B,) int64, and its tiles' places (B, 9, 2) for ``cut``."""
        numbers = draws.per_sample(1 + 2 * NUM_TILES)
        permutation = (numbers[:, 0] * np.float32(self.config.num_permutations)).astype(np.int64)
        return permutation, numbers[:, 1:].reshape(-1, NUM_TILES, 2)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return the logits of permutations (B, num_permutations); ``given`` has the number of the true one (B,).

        All 9B tiles go through the encoder as one batch, image-major.
        """
        (view,), (permutation, places) = batch.views, batch.draws
        tiles = normalize(cut(view, self.permutations[permutation], places))
        features = self.tile_head(self.encoder(tiles))
        return base.Embedded((self.classifier(features.reshape(len(view), -1)),), (permutation,))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the cross-entropy; ``accuracy``: the share of permutations recognized (chance: 1 / num_permutations).

        It is a mean over this rank's images, none of which depends on another, so the mean over ranks is the batch's.
        """
        (logits,), (permutation,) = map(base.full_precision, embedded.compared), embedded.given
        accuracy = (logits.detach().argmax(1) == permutation).float().mean()
        return base.Step(F.cross_entropy(logits, permutation), {"accuracy": accuracy})


def tile_side(size: int) -> int:
    """Return the side in pixels of the tiles of a view of ``size`` pixels.

    A cell of the grid is a third of the view, rounded down; a tile is 64/75 of it, as in the paper, and at least a
    pixel smaller, so that there can be a gap.  Raises ConfigError if that is less than 2 pixels.
    """
    cell = size // GRID
    side = min(round(cell * 64 / 75), cell - 1)
    if side < 2:
        raise ConfigError(f"jigsaw needs views of 9 px or more for its 3x3 tiles, got {size}: set --data.size")
    return side


def cut(view: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """Return the tiles of views (B, 3, S, S) in the given order: (9B, 3, T, T), image-major, channels_last.

    order: (B, 9) int64, the cell, counted row by row, from which each tile comes.  places: (B, 9, 2) in [0, 1), the
    tile's position in its cell, (y, x).  If S is not a multiple of 3, the last rows and columns are in no cell.
    """
    cell, side = view.shape[-1] // GRID, tile_side(view.shape[-1])
    corner = cell * torch.stack([order // GRID, order % GRID], 2) + (places * (cell - side + 1)).long()
    y, x = (corner[..., None] + torch.arange(side, device=view.device)).unbind(2)
    image = torch.arange(len(view), device=view.device)[:, None, None, None]
    pixels = view.permute(0, 2, 3, 1)[image, y[..., :, None], x[..., None, :]]
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)


def normalize(tiles: Tensor) -> Tensor:
    """Normalize each channel of each tile (N, 3, T, T) to mean 0 and standard deviation 1, or zeros if it is flat.

    Computed in fp32 (fp64 for fp64), returned in the tiles' dtype.
    """
    exact = base.full_precision(tiles)
    variance, mean = torch.var_mean(exact, (2, 3), correction=0, keepdim=True)
    return ((exact - mean) * (variance + EPSILON).rsqrt()).to(tiles.dtype)


@cache
def distant_permutations(num: int, num_tiles: int) -> npt.NDArray[np.int64]:
    """Return ``num`` permutations that are far from each other: (num, num_tiles), read-only (algorithm 1 of the paper).

    Each is the one with the largest sum of Hamming distances to the previous ones.  The paper starts at random and does
    not say how ties are broken.  Here the first is the identity, and ties go to the permutation whose nearest chosen
    one is farthest, then to the first in lexicographic order.  Without the former, some are nearly the same: of 100
    permutations of 9 tiles, the closest would differ in 2 places instead of 4.
    """
    every = itertools.chain.from_iterable(itertools.permutations(range(num_tiles)))
    candidates = np.fromiter(every, np.uint8).reshape(-1, num_tiles).T.copy()  # in lexicographic order
    sum_same = np.zeros(candidates.shape[1], np.int32)  # number of tiles in the same place, summed over the chosen ones
    max_same = np.zeros(candidates.shape[1], np.uint8)  # and its maximum over the chosen ones
    chosen = [0]
    while len(chosen) < num:
        same = np.zeros_like(max_same)
        for tiles, tile in zip(candidates, candidates[:, chosen[-1]], strict=True):
            same += (tiles == tile).view(np.uint8)
        np.maximum(max_same, same, out=max_same)
        sum_same += same
        sum_same[chosen[-1]] = 1 << 30
        is_not_best = (sum_same != sum_same.min()).view(np.uint8)
        chosen.append(int((max_same + (num_tiles + 1) * is_not_best).argmin()))
    permutations = candidates[:, chosen].T.astype(np.int64)
    permutations.flags.writeable = False
    return permutations
