"""SwAV (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2006.09882).

Several views of each image, two of them global.  Scores are the cosines of an embedding with learned prototypes.
Sinkhorn-Knopp turns the scores of each global view, over the batch, into codes, soft assignments that use all
prototypes equally; all other views predict these.  There are no negatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import distributed, losses
from sslx.data.batch import Batch
from sslx.data.facts import Facts
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, heads
from sslx.methods.config import MultiCropConfig

MIN_EPSILON = 0.02
"""The limit of losses.sinkhorn, which a Config cannot import, as that imports torch."""


@dataclass(frozen=True, kw_only=True)
class Config(MultiCropConfig):
    """SwAV's settings; the defaults are the paper's for ImageNet."""

    name: Literal["swav"] = "swav"
    num_local: int = 6
    """Local views beside the two global ones, which the paper crops with --augment.min-scale 0.14."""
    local_max_scale: float = 0.14
    """Largest fraction of the image's area that a local view may cover."""
    temperature: float = 0.1
    """Temperature of the softmax over scores that predicts a code (tau)."""
    epsilon: float = 0.05
    """Epsilon of Sinkhorn-Knopp; the smaller it is, the closer each code is to a single prototype."""
    sinkhorn_steps: int = 3
    """Number of steps of Sinkhorn-Knopp."""
    num_prototypes: int = 3000
    """Number of prototypes (K)."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings and of the prototypes."""
    queue_size: int = 0
    """Embeddings of past batches, of each global view, that share the prototypes with the batch's; for batches that
    are small beside num_prototypes (the paper: 3840 for batches of 256).  A multiple of the batch size."""
    queue_start: float = 0.075
    """Fraction of the training from which the queue is used (the paper: from epoch 15 of 200)."""
    freeze_prototypes: float = 0.005
    """Fraction of the training in which the prototypes stay as they are at first (the code: one epoch of 200)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("temperature", above=0)
        self.require("epsilon", least=MIN_EPSILON)
        self.require("sinkhorn_steps", least=1)
        self.require("num_prototypes", least=2)
        self.require("queue_size", least=0)
        self.require("queue_start", "freeze_prototypes", least=0, most=1)

    def check(self, batch_size: int, facts: "Facts") -> None:
        """Require a queue of whole batches, which ranks can divide, in addition to the checks of every method."""
        super().check(batch_size, facts)
        size = self.queue_size
        if size % batch_size:
            below = size // batch_size * batch_size
            sizes = f"{below} or {below + batch_size}" if below else f"{batch_size}"
            raise ConfigError(
                f"swav's queue holds whole batches of {batch_size}, got --method.queue-size {size}: take {sizes}"
            )

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder, projector, prototypes, and the queue of past embeddings.

    Prototypes have length 1.  The paper's code normalizes them before each step; this normalizes them at the start and
    after each step, which is the same.  So weight decay only changes the size of their steps.

    The queue, (2, queue_size, projection_dim), holds the embeddings of all ranks, the same on each.  The newest
    batch comes first, each in the order of its samples, or rank by rank with gradient caching.  Each rank uses a
    different part of it in Sinkhorn-Knopp, so that no embedding counts twice.

    Deviations from the paper's code: the queue is filled from the first step, not from ``queue_start``; the first
    layer of the projector has no bias, which the norm after it would remove; LARS steps biases and norms as SGD
    does, without weight decay, where the code's LARC adapts and decays them too.  As in the code, batch norm takes its
    statistics over all views of one size, the projector's over all views.
    """

    queue: Tensor

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.prototypes = nn.Linear(config.projection_dim, config.num_prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, config.queue_size, config.projection_dim))
        self.after_step()

    def embed(self, batch: Batch) -> base.Embedded:
        """Return scores (B, K) of all views; ``given`` has the embeddings (B, projection_dim) of both global ones.

        The scores are cosines, in fp32 in autocast too.  While prototypes are frozen, their gradient is zero.
        """
        z = self.projector(base.features(self.encoder, batch.views))
        z = F.normalize(base.full_precision(z), dim=1)
        weight = self.prototypes.weight
        weight = torch.where(self.progress < self.config.freeze_prototypes, weight.detach(), weight)
        with torch.autocast(z.device.type, enabled=False):
            scores = F.linear(z, weight)
        num_views = len(batch.views)
        return base.Embedded(scores.chunk(num_views), z.detach().chunk(num_views)[:2])

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the cross-entropy of global views' codes with all other views' predictions (equations 1, 2 and 6).

        Deviation from equation 6, as in the paper's code: the mean over pairs of views, not their sum.
        ``prototype_entropy``: entropy of the mean prediction of this rank's views, as a share of log K (0
        means that all take one prototype).  ``code_entropy``: mean entropy of codes, as a share of log K (0 is hard, 1
        is uniform).  ``projection_std``: spread of the first view's embeddings (0 means collapse).
        """
        scores, (z1, z2) = embedded
        distributed.check_same(len(z1), "batch size of SwAV")
        with torch.no_grad(), torch.autocast(z1.device.type, enabled=False):
            codes = self._codes(torch.stack(scores[:2]))
            if self.config.queue_size:
                new = distributed.all_gather(torch.stack([z1, z2], dim=1)).transpose(0, 1)
                self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, : self.config.queue_size])
        predictions = [F.log_softmax(score / self.config.temperature, dim=1) for score in scores]
        pairs = [(i, v) for i in range(2) for v in range(len(scores)) if v != i]
        loss = torch.stack([-(codes[i] * predictions[v]).sum(1).mean() for i, v in pairs]).mean()
        mean_prediction = torch.stack(predictions).detach().exp().mean((0, 1))
        entropies = {"prototype_entropy": losses.entropy(mean_prediction), "code_entropy": losses.entropy(codes).mean()}
        return base.Step(loss, {**entropies, "projection_std": losses.spread(z1)})

    def late_parameters(self) -> Sequence[Tensor]:
        """Return the prototypes, which are frozen at first."""
        return (self.prototypes.weight,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Make the prototypes' length 1 again."""
        weight = self.prototypes.weight
        weight.copy_(torch.where(self.progress < 1, F.normalize(weight, dim=1), weight))

    def _codes(self, scores: Tensor) -> Tensor:
        """Return the codes (2, B, K) of the global views' scores, with this rank's part of the queue once in use."""
        share = self.config.queue_size // distributed.world_size()
        past = self.queue.narrow(1, distributed.rank() * share, share)
        is_full = self.queue[:, -1:].any()  # a row that is not filled yet is 0; an embedding never is
        weight = (is_full & (self.progress >= self.config.queue_start)).to(scores.dtype)
        past_scores = past @ self.prototypes.weight.T
        return losses.sinkhorn(scores, self.config.epsilon, self.config.sinkhorn_steps, past_scores, weight)
