"""SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709).

Two views of each image; the encoder's features go through a projector; NT-Xent (equation 1) draws the two
views of an image together and pushes all other views of the batch, of all ranks, apart.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sslx import losses
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """SimCLR's settings; the defaults are the paper's for ImageNet.

    The loss is the paper's mean over all 2N views.  The paper's code adds up two means, which is twice that: with SGD,
    a learning rate copied from there makes steps half as long (with LARS only those of biases and norms).
    """

    name: Literal["simclr"] = "simclr"
    temperature: float = 0.1
    """Temperature of the softmax over similarities (tau); the paper takes 0.1 at batch 4096, 0.5 for CIFAR-10."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layers."""
    projector_layers: int = 2
    """Linear layers of the projector; 3 in SimCLR v2 (arXiv 2006.10029, section 2)."""
    projection_dim: int = 128
    """Width of the embeddings that are compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("temperature", above=0)
        self.require("projector_layers", least=1)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector and NT-Xent."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        hidden = [config.hidden_dim] * (config.projector_layers - 1)
        self.projector = heads.mlp(encoder.dim, *hidden, config.projection_dim)

    def embed(self, batch: Batch) -> base.Embedded:
        """Embed both views as one batch through encoder and projector: (z1, z2), each (B, projection_dim)."""
        return base.Embedded(self.projector(self.encoder(torch.cat(batch.views))).chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return NT-Xent.  ``alignment``: mean cosine of positives.  ``std``: embedding spread (0 means collapse)."""
        z1, z2 = embedded.compared
        with torch.no_grad():
            alignment = F.cosine_similarity(z1.float(), z2.float()).mean()
        metrics = {"alignment": alignment, "std": losses.spread(z1)}
        return base.Step(losses.nt_xent(z1, z2, self.config.temperature), metrics)
