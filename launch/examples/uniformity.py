"""Alignment and uniformity (Wang & Isola, "Understanding Contrastive Representation Learning", arXiv 2005.10242)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sslx import distributed
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods import base, heads
from sslx.methods.config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """The paper's numbers."""

    name: Literal["uniformity"] = "uniformity"
    sharpness: float = 2.0
    """Of the Gaussian potential (t)."""
    projection_dim: int = 128

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = heads.mlp(encoder.dim, encoder.dim, config.projection_dim)

    def embed(self, batch: Batch) -> base.Embedded:
        return base.Embedded(self.projector(self.encoder(torch.cat(batch.views))).chunk(2))

    def loss(self, embedded: base.Embedded) -> base.Step:
        u1, u2 = (F.normalize(base.full_precision(z), dim=1) for z in embedded.compared)
        with torch.autocast(u1.device.type, enabled=False):
            alignment = (u1 - u2).square().sum(1).mean()  # its mean over ranks is the whole batch's
            u1_of_all = distributed.all_gather_grad(u1)
            potential = (2 * self.config.sharpness * (u1 @ u1_of_all.T - 1)).exp().sum() - len(u1)
            total = distributed.sum_over_ranks_grad(potential)  # the logarithm is of the whole batch's sum
            uniformity = (total / (len(u1_of_all) * (len(u1_of_all) - 1))).log()
        metrics = {"alignment": alignment.detach().float(), "uniformity": uniformity.detach().float()}
        return base.Step(alignment + uniformity, metrics)
