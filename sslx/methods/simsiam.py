"""SimSiam (Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566).

Two views of each image go through one encoder and projector.  A predictor predicts from each view's projection that
of the other view, which gets no gradient.  There are no negatives and no target network.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from sslx import losses
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """SimSiam's settings; the defaults are the paper's for ResNet-50 on ImageNet."""

    name: Literal["simsiam"] = "simsiam"
    hidden_dim: int = 2048
    """Width of the projector's two hidden layers."""
    projection_dim: int = 2048
    """Width of the projections and of their predictions."""
    bottleneck_dim: int = 512
    """Width of the predictor's hidden layer; a quarter of projection_dim in the paper."""
    stop_gradient: bool = True
    """Stop the gradient of the projection that is predicted; without this, training collapses (table 1)."""

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector of three layers, predictor, and the negative cosine.

    Deviations from the paper's code: batch norm takes its statistics over both views together, and the predictor's
    learning rate follows the schedule of all others (the code keeps it constant, ``fix_pred_lr``).
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.hidden_dim, config.projection_dim)
        self.projector[-1] = nn.BatchNorm1d(config.projection_dim, affine=False)
        self.predictor = heads.mlp(config.projection_dim, config.bottleneck_dim, config.projection_dim, last_norm=False)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return predictions (p1, p2) and projections (z1, z2) of both views: (B, projection_dim) each."""
        z = self.projector(self.encoder(torch.cat(batch.views)))
        p1, p2 = self.predictor(z).chunk(2)
        if self.config.stop_gradient:
            return base.Embedded((p1, p2), z.detach().chunk(2))
        return base.Embedded((p1, p2, *z.chunk(2)))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return half the negative cosine, summed over both directions (equations 1 and 2), averaged over samples.

        ``alignment``: mean cosine of predictions and projections.  ``std``: spread of projections, which is 1
        on the whole sphere and 0 if all are the same.  The projector's last norm prevents 0, so a spread well below 1
        means collapse.
        """
        p1, p2, z1, z2 = map(base.full_precision, (*embedded.compared, *embedded.given))
        cosine = (F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1)) / 2
        metrics = {"alignment": cosine.detach().float().mean(), "std": losses.spread(z1)}
        return base.Step(-cosine.mean(), metrics)
