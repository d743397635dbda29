"""BYOL (Grill et al., "Bootstrap Your Own Latent", arXiv 2006.07733).

Two views of each image.  An online network (encoder, projector, predictor) predicts for each view what a target
network (encoder, projector) makes of the other.  The target is a moving average of the online network and gets no
gradient.  There are no negatives.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, ema, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """BYOL's numbers; the defaults are the paper's for 1000 epochs of ImageNet."""

    name: Literal["byol"] = "byol"
    target_momentum: float = 0.996
    """Share of the target's weights that a step keeps (tau), at first; it rises to 1 along half a cosine."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Width of the projections and of their predictions."""
    second_blur: float = 0.1
    """Probability of blur in the second view; the first has the recipe's, which is 1 in the paper (table 6)."""
    second_solarize: float = 0.2
    """Probability of solarization in the second view; the first has the recipe's, which is 0 in the paper."""

    def __post_init__(self) -> None:
        if min(self.hidden_dim, self.projection_dim) < 1 or not 0 <= self.target_momentum <= 1:
            raise ConfigError("byol needs a target_momentum in [0, 1] and widths >= 1")
        if not (0 <= self.second_blur <= 1 and 0 <= self.second_solarize <= 1):
            raise ConfigError("byol needs probabilities second_blur and second_solarize in [0, 1]")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:
    """One view by the recipe, and one by the recipe with the second view's own blur and solarization."""
    second = replace(augment, blur=config.second_blur, solarize=config.second_solarize)
    return ViewSpec(size=size, augment=augment), ViewSpec(size=size, augment=second)


class Method(base.Method):
    """Online network, target network, and the squared distance of normalised predictions and projections.

    Deviations from the paper's code: batch norm takes its statistics over both views together, the target starts
    with the online weights (the code draws its own and saw no difference), and of the heads' linear layers the
    first has no bias, which the norm after it would remove, and the last one has.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.predictor = heads.mlp(config.projection_dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.target = ema.frozen_copy(nn.Sequential(self.encoder, self.projector))
        self._average = ema.Average(self.target, self.encoder, self.projector)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Online predictions and target projections of both views (p1, p2, t1, t2): (B, projection_dim) each."""
        images = torch.cat(batch.views)
        p1, p2 = self.predictor(self.projector(self.encoder(images))).chunk(2)
        with torch.no_grad():
            t1, t2 = self.target(images).chunk(2)
        return p1, p2, t1, t2

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:
        """2 - 2 cos (equation 2), summed over both directions, mean over samples.

        ``alignment``: mean cosine of predictions and targets.  ``std``: spread of the target's projections (0:
        collapse).  ``target_momentum``: as the step's update will have it.
        """
        p1, p2, t1, t2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in embeddings)
        t1, t2 = t1.detach(), t2.detach()
        cosine = torch.stack([F.cosine_similarity(p1, t2), F.cosine_similarity(p2, t1)])
        metrics = {
            "alignment": cosine.detach().float().mean(),
            "std": base.spread(t1),
            "target_momentum": self._momentum(progress).float(),
        }
        return base.Step((2 - 2 * cosine).sum(0).mean(), metrics)

    def after_step(self, progress: Tensor) -> None:
        """The target follows the online network."""
        self._average.update(self._momentum(progress))

    def _momentum(self, progress: Tensor) -> Tensor:
        return ema.cosine_momentum(self.config.target_momentum, progress)
