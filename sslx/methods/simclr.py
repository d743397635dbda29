"""SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709).

Two views of each image; the encoder's features go through a projector; NT-Xent (equation 1) draws the two
views of an image together and pushes all other views of the batch, of all ranks, apart.
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
    """SimCLR's numbers; the defaults are the paper's for ImageNet.

    The loss is the paper's mean over all 2N views; its code sums two means, which is twice that: SGD at a learning rate
    copied from there takes half the step (with LARS only biases and norms do).
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.1
    """Of the softmax over similarities (tau); the paper takes 0.1 at batch 4096, 0.5 for CIFAR-10."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layers."""
    projector_layers: int = 2
    """Linear layers of the projector; 3 in SimCLR v2 (arXiv 2006.10029, section 2)."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or min(self.hidden_dim, self.projection_dim, self.projector_layers) < 1:
            raise ConfigError("simclr needs a temperature > 0, widths >= 1 and projector_layers >= 1")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:  # noqa: ARG001
    """Two views by the same recipe."""
    return (ViewSpec(size=size, augment=augment),) * 2


class Method(base.Method):
    """Encoder, projector and NT-Xent."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        hidden = [config.hidden_dim] * (config.projector_layers - 1)
        self.projector = heads.mlp(encoder.dim, *hidden, config.projection_dim)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both views as one batch through encoder and projector: two (B, projection_dim) tensors."""
        return self.projector(self.encoder(torch.cat(batch.views))).chunk(2)

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:  # noqa: ARG002
        """NT-Xent; ``alignment`` is the mean cosine of positives, ``std`` the spread of embeddings (0: collapse)."""
        z1, z2 = embeddings
        with torch.no_grad():
            alignment = F.cosine_similarity(z1.float(), z2.float()).mean()
        metrics = {"alignment": alignment, "std": base.spread(z1)}
        return base.Step(losses.nt_xent(z1, z2, self.config.temperature), metrics)
