"""MoCo v3 (Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057).

Two views of each image.  An encoder, projector and predictor make a query of each view; a momentum encoder and
projector, a moving average of the former, make a key of each.  A query finds the key of its image's other view among
those of the whole batch (algorithm 1).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import losses
from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, ema, heads
from sslx.methods.config import MethodConfig

ENCODERS = ("resnet", "vit")


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """MoCo v3's numbers; the defaults are the paper's for ViTs on ImageNet."""

    name: Literal["mocov3"] = "mocov3"
    temperature: float = 0.2
    """Of the softmax over similarities (tau): 0.2 for ViTs; the code's default, for ResNets, is 1."""
    momentum: float = 0.99
    """Share of the momentum encoder's weights that a step keeps, at first; it rises to 1 along half a cosine."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Width of queries and keys."""
    freeze_patches: bool = True
    """Whether a ViT's patch projection stays as it is, which steadies the training (section 4.2)."""
    second_blur: float = 0.1
    """Probability of blur in the second view; the first has the recipe's, which is 1 in the code."""
    second_solarize: float = 0.2
    """Probability of solarization in the second view; the first has the recipe's, which is 0 in the code."""

    def __post_init__(self) -> None:
        if min(self.hidden_dim, self.projection_dim) < 1 or not (
            0 < self.temperature < math.inf and 0 <= self.momentum <= 1
        ):
            raise ConfigError("mocov3 needs a temperature > 0, a momentum in [0, 1] and widths >= 1")
        if not (0 <= self.second_blur <= 1 and 0 <= self.second_solarize <= 1):
            raise ConfigError("mocov3 needs probabilities second_blur and second_solarize in [0, 1]")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:
    """One view by the recipe, and one by the recipe with the second view's own blur and solarization."""
    second = replace(augment, blur=config.second_blur, solarize=config.second_solarize)
    return ViewSpec(size=size, augment=augment), ViewSpec(size=size, augment=second)


class Method(base.Method):
    """Encoder, projector, predictor, their momentum copies, and InfoNCE in both directions.

    The heads are the code's: a projector of three layers on a ViT, of two on others, whose last norm has no weights;
    a predictor of two, with such a norm at its end on a ViT only.

    Deviations from the paper's code: batch norm takes its statistics over both views together; a ViT's position
    embeddings are timm's, learned ones, not fixed sines and cosines; its patch projection is frozen as timm, or the
    weights that were loaded, made it, not drawn anew; weight decay leaves biases and norms alone, with AdamW too.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        vit = encoder.kind == "vit"
        if vit and config.freeze_patches:
            encoder.freeze_patch_projection()
        hidden = [config.hidden_dim] * (2 if vit else 1)
        self.projector = heads.mlp(encoder.dim, *hidden, config.projection_dim)
        self.projector[-1] = nn.BatchNorm1d(config.projection_dim, affine=False)
        dims = config.projection_dim, config.hidden_dim, config.projection_dim
        self.predictor = heads.mlp(*dims, last_norm=vit, last_bias=False)
        if vit:
            self.predictor[-1] = nn.BatchNorm1d(config.projection_dim, affine=False)
        self.target = ema.frozen_copy(nn.Sequential(self.encoder, self.projector))
        self._average = ema.Average(self.target, self.encoder, self.projector)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Queries and keys of both views (q1, q2, k1, k2): (B, projection_dim) each."""
        images = torch.cat(batch.views)
        q1, q2 = self.predictor(self.projector(self.encoder(images))).chunk(2)
        with torch.no_grad():
            k1, k2 = self.target(images).chunk(2)
        return q1, q2, k1, k2

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:
        """2 tau InfoNCE of each direction, summed (algorithm 1).

        ``contrast_accuracy``: share of queries whose most similar key, of all ranks', is their own.  ``alignment``:
        mean cosine of queries and their keys.  ``std``: spread of keys (0: collapse).  ``momentum``: as the step's
        update will have it.
        """
        q1, q2, k1, k2 = embeddings
        there, found = losses.info_nce(q1, k2, self.config.temperature)
        back, also = losses.info_nce(q2, k1, self.config.temperature)
        with torch.no_grad():
            cosine = [F.cosine_similarity(q.float(), k.float()) for q, k in ((q1, k2), (q2, k1))]
        metrics = {
            "contrast_accuracy": (found["contrast_accuracy"] + also["contrast_accuracy"]) / 2,
            "alignment": torch.stack(cosine).mean(),
            "std": base.spread(k1),
            "momentum": self._momentum(progress).float(),
        }
        return base.Step(2 * self.config.temperature * (there + back), metrics)

    def after_step(self, progress: Tensor) -> None:
        """The momentum copies follow encoder and projector."""
        self._average.update(self._momentum(progress))

    def _momentum(self, progress: Tensor) -> Tensor:
        return ema.cosine_momentum(self.config.momentum, progress)
