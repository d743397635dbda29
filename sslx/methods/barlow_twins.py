"""Barlow Twins (Zbontar et al., "Self-Supervised Learning via Redundancy Reduction", arXiv 2103.03230).

Two views of each image; the encoder's features go through a projector; the loss draws the cross-correlation of the
two views' embeddings, taken over the samples of all ranks, towards the identity.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from sslx import losses
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The settings of Barlow Twins; the defaults are the paper's for ImageNet.

    The paper's two views, which are BYOL's, differ in blur and solarization; here both are the recipe's.

    The gradient is that of the whole batch; the paper's code divides it by the number of GPUs.  With LARS, which adapts
    weights, that changes only biases and norms: the paper gives them a learning rate of 0.0048 and the others 0.2.
    """

    name: Literal["barlow_twins"] = "barlow_twins"
    off_diagonal_weight: float = 0.0051
    """Weight of the squared correlations between different dimensions (lambda)."""
    hidden_dim: int = 8192
    """Width of the projector's two hidden layers."""
    projection_dim: int = 8192
    """Width of the embeddings whose dimensions are decorrelated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("off_diagonal_weight", least=0)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector and the loss of the cross-correlation.

    Deviations from the paper's code: batch norm takes its statistics over both views together; biases and norms have
    the learning rate of the weights.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        widths = config.hidden_dim, config.hidden_dim, config.projection_dim
        self.projector = heads.mlp(encoder.dim, *widths, last_norm=False, last_bias=False)

    def embed(self, batch: Batch) -> base.Embedded:
        """Embed both views as one batch through encoder and projector: (z1, z2), each (B, projection_dim)."""
        return base.Embedded(self.projector(self.encoder(torch.cat(batch.views))).chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the loss and its metrics.

        ``on_diagonal`` is the mean correlation of a dimension with itself in the other view, ``off_diagonal`` the root
        mean square of those with other dimensions, and ``std`` the spread of embeddings (0 means collapse).
        """
        z1, z2 = embedded.compared
        loss, metrics = losses.barlow_twins(z1, z2, self.config.off_diagonal_weight)
        return base.Step(loss, {**metrics, "std": losses.spread(z1)})
