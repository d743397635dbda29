"""VICReg (Bardes et al., "Variance-Invariance-Covariance Regularization", arXiv 2105.04906).

Two views of each image; the encoder's features go through an expander; the loss draws the two views of an image
together, holds each dimension's standard deviation up and its covariances with others down, over all ranks' samples.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
    """VICReg's numbers; the defaults are the paper's for ImageNet."""

    name: Literal["vicreg"] = "vicreg"
    invariance_weight: float = 25.0
    """Of the mean squared distance between the two views of an image (lambda)."""
    variance_weight: float = 25.0
    """Of what the dimensions' standard deviations lack (mu)."""
    covariance_weight: float = 1.0
    """Of the squared covariances between different dimensions (nu)."""
    gamma: float = 1.0
    """The standard deviation that each dimension is to have at least."""
    hidden_dim: int = 8192
    """Width of the expander's two hidden layers."""
    projection_dim: int = 8192
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        weights = self.invariance_weight, self.variance_weight, self.covariance_weight
        if min(*weights, self.gamma) < 0 or min(self.hidden_dim, self.projection_dim) < 1:
            raise ConfigError("vicreg needs weights and gamma >= 0 and widths >= 1")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:  # noqa: ARG001
    """Two views by the same recipe.  The paper's has a solarisation of 0.1, which ``augment.solarize`` sets."""
    return (ViewSpec(size=size, augment=augment),) * 2


class Method(base.Method):
    """Encoder, expander and the loss of variance, invariance and covariance.

    Deviation from the paper's code: batch norm takes its statistics over both views together.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        widths = config.hidden_dim, config.hidden_dim, config.projection_dim
        self.expander = heads.mlp(encoder.dim, *widths, last_norm=False, last_bias=False)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both views as one batch through encoder and expander: two (B, projection_dim) tensors."""
        return self.expander(self.encoder(torch.cat(batch.views))).chunk(2)

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:  # noqa: ARG002
        """``invariance``, ``variance`` and ``covariance`` are the terms without their weights, ``std`` the spread of
        embeddings (0: collapse)."""
        c, (z1, z2) = self.config, embeddings
        weights = c.invariance_weight, c.variance_weight, c.covariance_weight
        loss, metrics = losses.vicreg(z1, z2, *weights, c.gamma)
        return base.Step(loss, {**metrics, "std": base.spread(z1)})
