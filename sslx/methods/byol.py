"""BYOL (Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733).

Two views of each image.  An online network (encoder, projector, predictor) predicts for each view what a target
network (encoder, projector) makes of the other.  The target is a moving average of the online network and gets no
gradient.  There are no negatives.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sslx import losses
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, ema, heads
from sslx.methods.config import SecondViewConfig


@dataclass(frozen=True, kw_only=True)
class Config(SecondViewConfig):
    """BYOL's settings; the defaults are the paper's for 1000 epochs of ImageNet."""

    name: Literal["byol"] = "byol"
    target_momentum: float = 0.996
    """Fraction of the target's weights that a step keeps (tau) at first; it rises to 1 along half a cosine."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Width of the projections and of their predictions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("target_momentum", least=0, most=1)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Online network, target network, and the squared distance of normalized predictions and projections.

    Deviations from the paper's code: batch norm takes its statistics over both views together; the target starts
    with the online weights (the code draws its own and saw no difference); and of the heads' linear layers the
    first has no bias, which the norm after it would remove, while the last has one.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.predictor = heads.mlp(config.projection_dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.target = ema.Average(encoder, projector=self.projector, base=config.target_momentum)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return predictions (p1, p2) and target projections (t1, t2) of both views: (B, projection_dim) each."""
        images = torch.cat(batch.views)
        predictions = self.predictor(self.projector(self.encoder(images)))
        with torch.no_grad():
            targets = self.target(images)
        return base.Embedded(predictions.chunk(2), targets.chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return 2 - 2 cos (equation 2), summed over both directions and averaged over samples.

        ``alignment``: mean cosine of predictions and targets.  ``std``: spread of the target's projections (0 means
        collapse).  ``target_momentum``: the value of this step's update.
        """
        (p1, p2), (t1, t2) = (map(base.full_precision, tensors) for tensors in embedded)
        cosine = torch.stack([F.cosine_similarity(p1, t2), F.cosine_similarity(p2, t1)])
        metrics = {
            "alignment": cosine.detach().float().mean(),
            "std": losses.spread(t1),
            "target_momentum": self.target.momentum(self.progress).float(),
        }
        return base.Step((2 - 2 * cosine).sum(0).mean(), metrics)

    def after_step(self) -> None:
        """Let the target follow the online network."""
        self.target.follow(self.progress)
