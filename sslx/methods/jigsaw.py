"""Jigsaw (Noroozi & Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
arXiv 1603.09246).

One view of each image is cut into 3x3 tiles, which are put in the order of one of a fixed set of permutations.  Each
tile goes through the encoder alone (the context-free network); a classifier over all nine says which permutation it
was.  Gaps between the tiles and their own normalization keep edges and low-level statistics from giving it away.
"""

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
"""Added to a tile's variance."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The permutations and the widths of the context-free network; the defaults are the paper's for ImageNet."""

    num_views: ClassVar = 1  # the paper's has 225 px and is gray in 30 % of images (``augment.gray``)
    name: Literal["jigsaw"] = "jigsaw"
    num_permutations: int = 1000
    """Permutations to tell apart; of those in the paper's table 4 the most, and the outputs of its code."""
    tile_dim: int = 512
    """Width of the layer that all tiles share (fc6)."""
    hidden_dim: int = 4096
    """Width of the classifier's hidden layer, over all tiles (fc7)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("num_permutations", least=2, most=math.factorial(NUM_TILES))

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, a layer that all tiles share, and a classifier of permutations.

    Deviations from the paper and its code: any encoder in place of AlexNet's convolutions, no dropout after the two
    hidden layers, and no shifts of the color channels against one another.
    """

    permutations: Tensor
    """(num_permutations, 9) int64.  In no checkpoint: the config says all of it."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        side = tile_side(encoder.size)
        if not encoders.accepts_size(encoder, side):
            raise ConfigError(
                f"jigsaw cuts views of {encoder.size} px into tiles of {side} px, which {type(encoder.trunk).__name__} "
                "does not take: take a ResNet or a larger --data.size"
            )
        self.config = config
        self.tile_head = nn.Sequential(nn.Linear(encoder.dim, config.tile_dim), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(
            nn.Linear(NUM_TILES * config.tile_dim, config.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden_dim, config.num_permutations),
        )
        chosen = torch.tensor(distant_permutations(config.num_permutations, NUM_TILES))
        self.register_buffer("permutations", chosen, persistent=False)

    def draw(self, draws: Draws) -> tuple[npt.NDArray[Any], ...]:
        """The number of each image's permutation, (B,) int64, and the places of its tiles, (B, 9, 2): see ``cut``."""
        numbers = draws.per_sample(1 + 2 * NUM_TILES)
        permutation = (numbers[:, 0] * np.float32(self.config.num_permutations)).astype(np.int64)
        return permutation, numbers[:, 1:].reshape(-1, NUM_TILES, 2)

    def embed(self, batch: Batch) -> base.Embedded:
        """The logits of permutations (B, num_permutations); given the number of the true one (B,).

        All 9B tiles go through the encoder as one batch, image-major.
        """
        (view,), (permutation, places) = batch.views, batch.draws
        tiles = normalize(cut(view, self.permutations[permutation], places))
        features = self.tile_head(self.encoder(tiles))
        return base.Embedded((self.classifier(features.reshape(len(view), -1)),), (permutation,))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Cross-entropy; ``accuracy`` is the share of permutations recognized (1 / num_permutations: chance).

        A mean over this rank's images: no image's loss depends on another's, so the mean over ranks is the batch's.
        """
        (logits,), (permutation,) = map(base.full_precision, embedded.compared), embedded.given
        accuracy = (logits.detach().argmax(1) == permutation).float().mean()
        return base.Step(F.cross_entropy(logits, permutation), {"accuracy": accuracy})


def tile_side(size: int) -> int:
    """The side in pixels of the tiles of a view of ``size`` pixels.

    A cell of the grid is a third of the view, rounded down; a tile is 64/75 of it, as in the paper, and at least a
    pixel smaller, so that there can be a gap.  Raises ConfigError where that leaves less than 2 pixels.
    """
    cell = size // GRID
    side = min(round(cell * 64 / 75), cell - 1)
    if side < 2:
        raise ConfigError(f"jigsaw needs views of 9 px or more for its 3x3 tiles, got {size}: set --data.size")
    return side


def cut(view: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """The tiles of views (B, 3, S, S) in the given order: (9B, 3, T, T), image-major, channels_last.

    order: (B, 9) int64, the cell, row by row, from which each tile comes.  places: (B, 9, 2) in [0, 1), where in its
    cell the tile is, (y, x).  Where S is no multiple of 3, the last rows and columns are in no cell.
    """
    cell, side = view.shape[-1] // GRID, tile_side(view.shape[-1])
    corner = cell * torch.stack([order // GRID, order % GRID], 2) + (places * (cell - side + 1)).long()
    y, x = (corner[..., None] + torch.arange(side, device=view.device)).unbind(2)
    image = torch.arange(len(view), device=view.device)[:, None, None, None]
    pixels = view.permute(0, 2, 3, 1)[image, y[..., :, None], x[..., None, :]]
    return pixels.flatten(0, 1).permute(0, 3, 1, 2)


def normalize(tiles: Tensor) -> Tensor:
    """Each channel of each tile (N, 3, T, T) less its mean, by its standard deviation; a flat one gives zeros.

    Computed in fp32 (fp64 for fp64), returned in the tiles' dtype.
    """
    exact = base.full_precision(tiles)
    variance, mean = torch.var_mean(exact, (2, 3), correction=0, keepdim=True)
    return ((exact - mean) * (variance + EPSILON).rsqrt()).to(tiles.dtype)


@cache
def distant_permutations(num: int, num_tiles: int) -> npt.NDArray[np.int64]:
    """``num`` of all permutations, far from each other: (num, num_tiles), read-only (algorithm 1 of the paper).

    Each is the one with the largest sum of Hamming distances to those before.  The paper starts at random and leaves
    open which of equals it takes; here the first is the identity, and of equals that is taken whose nearest is
    farthest, then the first in lexicographic order.  Taking the first at once would find near twins: of 100
    permutations of 9 tiles, 2 apart instead of 4.
    """
    every = np.zeros((1, 1), np.uint8)  # (tiles, permutations), in lexicographic order
    for n in range(2, num_tiles + 1):
        by_first = [np.vstack([np.full_like(every[:1], first), every + (every >= first)]) for first in range(n)]
        every = np.hstack(by_first)
    shared = np.zeros(every.shape[1], np.int32)  # tiles in the same place, summed over the chosen
    nearest = np.zeros(every.shape[1], np.uint8)  # and the most with any of them
    chosen = [0]
    while len(chosen) < num:
        same = np.zeros_like(nearest)
        for tiles, tile in zip(every, every[:, chosen[-1]], strict=True):
            same += (tiles == tile).view(np.uint8)
        np.maximum(nearest, same, out=nearest)
        shared += same
        shared[chosen[-1]] = 1 << 30
        more = (shared != shared.min()).view(np.uint8)
        chosen.append(int((nearest + (num_tiles + 1) * more).argmin()))
    permutations = every[:, chosen].T.astype(np.int64)
    permutations.flags.writeable = False
    return permutations
