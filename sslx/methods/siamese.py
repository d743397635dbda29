"""Siamese margin (Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006).

Pairs of views go through one encoder and projector; equation 4 draws similar pairs together and pushes dissimilar
ones apart until they are a margin away.  Pairs are balanced and the same at any number of ranks.

Deviations: embeddings are normalised unless ``normalize`` is off; the paper leaves them as they are and has few
dimensions.  The paper finds similar pairs by distance in the input, by known transformations or by labels, and takes
all pairs of a data set; here each step has one similar and one dissimilar pair for each sample of its batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sslx import losses
from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The margin, the pairs and the projector; the paper trains a small network for each data set and fixes none."""

    name: Literal["siamese"] = "siamese"
    pairs: Literal["views", "labels"] = "views"
    """views: similar are the two views of an image, dissimilar those of two images.  labels: similar are images of one
    label, dissimilar those of two labels."""
    margin: float = 1.0
    """Distance from which on dissimilar pairs are left alone (m); normalised embeddings are at most 2 apart."""
    normalize: bool = True
    """Compare embeddings of length 1.  Off, as in the paper, the margin must suit the embeddings' own scale."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        if not 0 < self.margin < math.inf or min(self.hidden_dim, self.projection_dim) < 1:
            raise ConfigError("siamese needs a margin > 0 and widths >= 1")
        if self.normalize and self.margin > 2:
            raise ConfigError(
                f"embeddings of length 1 are at most 2 apart: take --method.margin 2 or less, not {self.margin}"
            )

    def check(self, batch_size: int, labelled: bool) -> None:
        """Besides what every method needs: labels, for pairs by labels."""
        super().check(batch_size, labelled)
        if self.pairs == "labels" and not labelled:
            raise ConfigError("--method.pairs labels needs a source with labels, and this one has none: take views")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:  # noqa: ARG001
    """Two views by the same recipe."""
    return (ViewSpec(size=size, augment=augment),) * 2


class Method(base.Method):
    """Encoder, projector and margin loss."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        # A last BN spreads the embeddings, but fixes their scale, which unnormalised ones learn from the margin.
        dims = encoder.dim, config.hidden_dim, config.projection_dim
        self.projector = heads.mlp(*dims, last_norm=config.normalize)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both views as one batch through encoder and projector: two (B, projection_dim) tensors.

        With ``pairs="labels"`` the labels come third, (B,) fp64: embeddings are floats that may require a gradient.
        """
        z1, z2 = self.projector(self.encoder(torch.cat(batch.views))).chunk(2)
        if self.config.pairs == "views":
            return z1, z2
        assert batch.label is not None
        return z1, z2, batch.label.double()

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:  # noqa: ARG002
        """The margin loss.

        Metrics, of this rank's pairs: ``similar`` and ``dissimilar``, mean distances (the latter 0 where the batch has
        no such pair); ``pair_accuracy``, the share of pairs on the right side of half the margin (0.5: collapse).
        """
        z1, z2, *label = embeddings
        z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
        if self.config.normalize:
            z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        similar, dissimilar, some = losses.pair_distances(z1, z2, label[0].long() if label else None)
        loss = losses.margin_loss(similar, dissimilar, some, self.config.margin)
        near, far, half = similar.detach().float(), dissimilar.detach().float() * some, self.config.margin / 2
        right = (near < half).float() + (far > half).float()
        accuracy = right.mean() / (1 + some.float())
        return base.Step(loss, {"pair_accuracy": accuracy, "similar": near.mean(), "dissimilar": far.mean()})
