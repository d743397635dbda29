"""Siamese margin (Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006).

Pairs of views go through one encoder and projector; equation 4 draws similar pairs together and pushes dissimilar
ones apart until they are a margin away.  Pairs are balanced and the same at any number of ranks.

Deviations: embeddings are normalized unless ``normalize`` is off; the paper leaves them as they are and has few
dimensions.  The paper finds similar pairs by distance in the input, by known transformations or by labels, and takes
all pairs of a data set; here each step has one similar and one dissimilar pair for each sample of its batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sslx import losses
from sslx.data.batch import Batch
from sslx.data.facts import Facts
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The margin, the pairs and the projector; the paper trains a small network for each data set and fixes none."""

    name: Literal["siamese"] = "siamese"
    pairs: Literal["views", "labels"] = "views"
    """views: the two views of an image are similar, views of two images dissimilar.  labels: images of one label are
    similar, images of two labels dissimilar."""
    margin: float = 1.0
    """Distance beyond which dissimilar pairs have no loss (m); normalized embeddings are at most 2 apart."""
    normalize: bool = True
    """Compare embeddings of length 1.  If off, as in the paper, the margin must suit the embeddings' scale."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("margin", above=0)
        if self.normalize and self.margin > 2:
            raise ConfigError(
                f"embeddings of length 1 are at most 2 apart: take --method.margin 2 or less, not {self.margin}"
            )

    def check(self, batch_size: int, facts: "Facts") -> None:
        """Require labels for pairs by labels, in addition to the checks of every method."""
        super().check(batch_size, facts)
        if self.pairs == "labels" and not facts.has_classes:
            raise ConfigError("--method.pairs labels needs a source with labels, and this one has none: take views")

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector and margin loss."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        # A last BN spreads the embeddings but fixes their scale, which unnormalized ones learn from the margin.
        dims = encoder.dim, config.hidden_dim, config.projection_dim
        self.projector = heads.mlp(*dims, last_norm=config.normalize)

    def embed(self, batch: Batch) -> base.Embedded:
        """Embed both views as one batch through encoder and projector: (z1, z2), each (B, projection_dim).

        With ``pairs="labels"``, ``given`` has the labels.
        """
        z = self.projector(self.encoder(torch.cat(batch.views))).chunk(2)
        if self.config.pairs == "views":
            return base.Embedded(z)
        assert batch.label is not None
        return base.Embedded(z, (batch.label,))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the margin loss.

        Metrics, of this rank's pairs: ``similar`` and ``dissimilar``, mean distances (the latter is 0 if the batch has
        no such pair); ``pair_accuracy``, the share of pairs on the right side of half the margin (0.5 means collapse).
        """
        z1, z2 = map(base.full_precision, embedded.compared)
        label = embedded.given[0] if embedded.given else None
        if self.config.normalize:
            z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        similar, dissimilar, has_dissimilar = losses.pair_distances(z1, z2, label)
        loss = losses.margin_loss(similar, dissimilar, has_dissimilar, self.config.margin)
        near, far, half = similar.detach().float(), dissimilar.detach().float() * has_dissimilar, self.config.margin / 2
        is_correct = (near < half).float() + (far > half).float()
        accuracy = is_correct.mean() / (1 + has_dissimilar.float())
        return base.Step(loss, {"pair_accuracy": accuracy, "similar": near.mean(), "dissimilar": far.mean()})
