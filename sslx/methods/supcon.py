"""SupCon (Khosla et al., "Supervised Contrastive Learning", arXiv 2004.11362).

Like SimCLR, but with labels: an embedding's positives are all views of its label in the batch of all ranks (L_out,
equation 2).  The projector is SimCLR's; the paper's has no BN.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from sslx import losses
from sslx.data.batch import Batch
from sslx.data.facts import Facts
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """SupCon's settings; the defaults are the paper's for ImageNet.

    The loss is equation 2.  The published code multiplies it by the temperature (TensorFlow) or by temperature / 0.07
    (PyTorch): multiply a learning rate of SGD copied from there by that.
    """

    name: Literal["supcon"] = "supcon"
    temperature: float = 0.1
    """Temperature of the softmax over similarities (tau)."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("temperature", above=0)

    def check(self, batch_size: int, facts: "Facts") -> None:
        """Require labels, in addition to the checks of every method."""
        super().check(batch_size, facts)
        if not facts.has_classes:
            raise ConfigError("supcon needs a source with labels, and this one has none: take simclr")

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector and SupCon."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim)

    def embed(self, batch: Batch) -> base.Embedded:
        """Embed both views as one batch: two (B, projection_dim) tensors.  ``given`` has the labels."""
        assert batch.label is not None
        return base.Embedded(self.projector(self.encoder(torch.cat(batch.views))).chunk(2), (batch.label,))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return SupCon.  ``alignment``: mean cosine of positives.  ``std``: embedding spread (0 means collapse)."""
        (z1, z2), (label,) = embedded
        loss, alignment = losses.sup_con(z1, z2, label, self.config.temperature)
        return base.Step(loss, {"alignment": alignment.float(), "std": losses.spread(z1)})
