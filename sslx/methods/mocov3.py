"""MoCo v3 (Chen, Xie & He, "An Empirical Study of Training Self-Supervised Vision Transformers", arXiv 2104.02057).

Two views of each image.  An encoder, projector and predictor make a query of each view; a momentum encoder and
projector, a moving average of the former, make a key of each.  A query finds the key of its image's other view among
those of the whole batch (algorithm 1).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from sslx import losses
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, ema, heads
from sslx.methods.config import SecondViewConfig


@dataclass(frozen=True, kw_only=True)
class Config(SecondViewConfig):
    """MoCo v3's settings; the defaults are the paper's for ViTs on ImageNet."""

    encoders: ClassVar = ("resnet", "vit")
    name: Literal["mocov3"] = "mocov3"
    temperature: float = 0.2
    """Temperature of the softmax over similarities (tau): 0.2 for ViTs; the code's default, for ResNets, is 1."""
    momentum: float = 0.99
    """Fraction of the momentum encoder's weights that a step keeps at first; it rises to 1 along half a cosine."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Width of queries and keys."""
    freeze_patches: bool = True
    """Keep a ViT's patch projection as it is initialized, which stabilizes the training (section 4.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("temperature", above=0)
        self.require("momentum", least=0, most=1)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector, predictor, their momentum copies, and InfoNCE in both directions.

    The heads are the code's: a projector of three layers on a ViT, of two on others, whose last norm has no weights;
    a predictor of two, with such a norm at its end on a ViT only.

    Deviations from the paper's code: batch norm takes its statistics over both views together; a ViT's position
    embeddings are timm's, learned ones, not fixed sines and cosines; its patch projection is frozen as timm, or the
    weights that were loaded, made it, not drawn anew; weight decay leaves biases and norms alone, with AdamW too.
    """

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        is_vit = encoder.kind == "vit"
        if is_vit and config.freeze_patches:
            encoder.freeze_patch_projection()
        hidden = [config.hidden_dim] * (2 if is_vit else 1)
        self.projector = heads.mlp(encoder.dim, *hidden, config.projection_dim)
        self.projector[-1] = nn.BatchNorm1d(config.projection_dim, affine=False)
        dims = config.projection_dim, config.hidden_dim, config.projection_dim
        self.predictor = heads.mlp(*dims, last_norm=is_vit, last_bias=False)
        if is_vit:
            self.predictor[-1] = nn.BatchNorm1d(config.projection_dim, affine=False)
        self.target = ema.Average(encoder, projector=self.projector, base=config.momentum)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return queries (q1, q2) and keys (k1, k2) of both views: (B, projection_dim) each."""
        images = torch.cat(batch.views)
        queries = self.predictor(self.projector(self.encoder(images)))
        with torch.no_grad():
            keys = self.target(images)
        return base.Embedded(queries.chunk(2), keys.chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return 2 tau InfoNCE, summed over both directions (algorithm 1).

        ``contrast_accuracy``: share of queries whose most similar key, of all ranks', is their own.  ``alignment``:
        mean cosine of queries and their keys.  ``std``: spread of keys (0 means collapse).  ``momentum``: as the step's
        update will have it.
        """
        (q1, q2), (k1, k2) = embedded
        loss_1, metrics_1 = losses.info_nce(q1, k2, self.config.temperature)
        loss_2, metrics_2 = losses.info_nce(q2, k1, self.config.temperature)
        with torch.no_grad():
            cosine = [F.cosine_similarity(q.float(), k.float()) for q, k in ((q1, k2), (q2, k1))]
        metrics = {
            "contrast_accuracy": (metrics_1["contrast_accuracy"] + metrics_2["contrast_accuracy"]) / 2,
            "alignment": torch.stack(cosine).mean(),
            "std": losses.spread(k1),
            "momentum": self.target.momentum(self.progress).float(),
        }
        return base.Step(2 * self.config.temperature * (loss_1 + loss_2), metrics)

    def after_step(self) -> None:
        """Let the momentum copies follow encoder and projector."""
        self.target.follow(self.progress)
