"""VICReg (Bardes et al., "Variance-Invariance-Covariance Regularization", arXiv 2105.04906).

Two views of each image; the encoder's features go through an expander; the loss draws the two views of an image
together, holds each dimension's standard deviation up and its covariances with others down, over all ranks' samples.
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
    """VICReg's settings; the defaults are the paper's for ImageNet, whose solarization is ``augment.solarize`` 0.1."""

    name: Literal["vicreg"] = "vicreg"
    invariance_weight: float = 25.0
    """Weight of the mean squared distance between the two views of an image (lambda)."""
    variance_weight: float = 25.0
    """Weight of the amounts by which the dimensions' standard deviations are below gamma (mu)."""
    covariance_weight: float = 1.0
    """Weight of the squared covariances between different dimensions (nu)."""
    gamma: float = 1.0
    """Minimum standard deviation of each dimension."""
    hidden_dim: int = 8192
    """Width of the expander's two hidden layers."""
    projection_dim: int = 8192
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("invariance_weight", "variance_weight", "covariance_weight", "gamma", least=0)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, expander and the loss of variance, invariance and covariance.

    Deviation from the paper's code: batch norm takes its statistics over both views together.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        widths = config.hidden_dim, config.hidden_dim, config.projection_dim
        self.expander = heads.mlp(encoder.dim, *widths, last_norm=False, last_bias=False)

    def embed(self, batch: Batch) -> base.Embedded:
        """Embed both views as one batch through encoder and expander: (z1, z2), each (B, projection_dim)."""
        return base.Embedded(self.expander(self.encoder(torch.cat(batch.views))).chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the loss and its metrics.

        ``invariance``, ``variance`` and ``covariance`` are the unweighted terms, and ``std`` is the spread of
        embeddings (0 means collapse).
        """
        c, (z1, z2) = self.config, embedded.compared
        weights = c.invariance_weight, c.variance_weight, c.covariance_weight
        loss, metrics = losses.vicreg(z1, z2, *weights, c.gamma)
        return base.Step(loss, {**metrics, "std": losses.spread(z1)})
