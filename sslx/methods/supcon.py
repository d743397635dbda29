"""SupCon (Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362).

As SimCLR, but with labels: an embedding's positives are all views of its label in the batch of all ranks (L_out,
equation 2).  The projector is SimCLR's; the paper's has no BN.
"""

import math
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
    """SupCon's numbers; the defaults are the paper's for ImageNet.

    The loss is equation 2.  The published code multiplies it by the temperature (TensorFlow) or by temperature / 0.07
    (PyTorch): multiply a learning rate of SGD that is copied from there by the same.
    """

    name: Literal["supcon"] = "supcon"
    temperature: float = 0.1
    """Of the softmax over similarities (tau)."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf or min(self.hidden_dim, self.projection_dim) < 1:
            raise ConfigError("supcon needs a temperature > 0 and widths >= 1")

    def check(self, batch_size: int, labelled: bool) -> None:
        """Besides what every method needs: labels."""
        super().check(batch_size, labelled)
        if not labelled:
            raise ConfigError("supcon needs a source with labels, and this one has none: take simclr")


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:  # noqa: ARG001
    """Two views by the same recipe."""
    return (ViewSpec(size=size, augment=augment),) * 2


class Method(base.Method):
    """Encoder, projector and SupCon."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both views as one batch through encoder and projector: two (B, projection_dim) tensors; the labels.

        The labels are (B,) fp64: embeddings are floats that may require a gradient.
        """
        assert batch.label is not None
        z1, z2 = self.projector(self.encoder(torch.cat(batch.views))).chunk(2)
        return z1, z2, batch.label.double()

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:  # noqa: ARG002
        """SupCon; ``alignment`` is the mean cosine of all positives, ``std`` the embeddings' spread (0: collapse)."""
        z1, z2, label = embeddings
        loss, alignment = losses.sup_con(z1, z2, label.long(), self.config.temperature)
        return base.Step(loss, {"alignment": alignment.float(), "std": base.spread(z1)})
