"""SwAV (Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2006.09882).

Several views of each image, two of them global.  Scores are the cosines of an embedding with learned prototypes.
Sinkhorn-Knopp turns the scores of each global view, over the batch, into codes, soft assignments that use all
prototypes alike; all other views predict these.  There are no negatives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import distributed, losses
from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base, heads, multicrop
from sslx.methods.config import MethodConfig, check_local_views

LEAST_EPSILON = 0.02
"""That of losses.sinkhorn, which a Config cannot import: it takes torch."""


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """SwAV's numbers; the defaults are the paper's for ImageNet."""

    name: Literal["swav"] = "swav"
    num_local: int = 6
    """Small views beside the two global ones, which the paper crops with --augment.min-scale 0.14."""
    local_size: int | None = None
    """Their side in pixels; default: the paper's 96 of 224 as a share of the views' size, to a multiple of 8."""
    local_min_scale: float = 0.05
    """Smallest share of the image's area that a local view may cover."""
    local_max_scale: float = 0.14
    """Largest share of the image's area that a local view may cover."""
    temperature: float = 0.1
    """Of the softmax over scores that predicts a code (tau)."""
    epsilon: float = 0.05
    """Of Sinkhorn-Knopp: the smaller, the closer the codes are to one prototype a sample."""
    sinkhorn_steps: int = 3
    """Steps of Sinkhorn-Knopp."""
    num_prototypes: int = 3000
    """Prototypes (K)."""
    hidden_dim: int = 2048
    """Width of the projector's hidden layer."""
    projection_dim: int = 128
    """Width of the embeddings and of the prototypes."""
    queue_size: int = 0
    """Embeddings of past batches, of each global view, that share the prototypes with the batch's; for batches that
    are small beside num_prototypes (the paper: 3840 for batches of 256).  A multiple of the batch size."""
    queue_start: float = 0.075
    """Share of training from which the queue is used (the paper: from epoch 15 of 200)."""
    freeze_prototypes: float = 0.005
    """Share of training, from its start, in which the prototypes stay as they are (the code: one epoch, of 200)."""

    def __post_init__(self) -> None:
        check_local_views(self.num_local, self.local_size, self.local_min_scale, self.local_max_scale, self.name)
        if not (
            0 < self.temperature < math.inf and LEAST_EPSILON <= self.epsilon < math.inf and self.sinkhorn_steps >= 1
        ):
            raise ConfigError(f"swav needs a temperature > 0, epsilon >= {LEAST_EPSILON} and sinkhorn_steps >= 1")
        if min(self.hidden_dim, self.projection_dim) < 1 or self.num_prototypes < 2 or self.queue_size < 0:
            raise ConfigError("swav needs widths >= 1, num_prototypes >= 2 and queue_size >= 0")
        if not (0 <= self.queue_start <= 1 and 0 <= self.freeze_prototypes <= 1):
            raise ConfigError("swav needs shares of training queue_start and freeze_prototypes in [0, 1]")

    def check(self, batch_size: int, labelled: bool) -> None:
        """Besides what every method needs: a queue of whole batches, which all ranks can share out."""
        super().check(batch_size, labelled)
        size = self.queue_size
        if size % batch_size:
            least = size // batch_size * batch_size
            raise ConfigError(
                f"swav's queue holds whole batches of {batch_size}, got --method.queue-size {size}: take "
                f"{f'{least} or ' if least else ''}{least + batch_size}"
            )


def views(config: Config, augment: Augment, size: int) -> tuple[ViewSpec, ...]:
    """Two global views by the recipe, then the local ones."""
    local = config.num_local, config.local_size, config.local_min_scale, config.local_max_scale
    return (ViewSpec(size=size, augment=augment),) * 2 + multicrop.local_views(augment, size, *local)


class Method(base.Method):
    """Encoder, projector, prototypes, and the queue of past embeddings.

    Prototypes have length 1.  The paper's code normalises them before each step, this one at the start and after each
    step: the same.  So weight decay does not change them, but for the size of their steps.

    The queue, (2, queue_size, projection_dim), has the embeddings of all ranks, newest batch first, the same on all
    ranks; within a batch in the order of its samples, with gradient caching rank by rank.  Each rank brings its own
    share of it to Sinkhorn-Knopp, so that none counts twice.

    Deviations from the paper's code: the queue is filled from the first step, not from ``queue_start``; the first
    layer of the projector has no bias, which the norm after it would remove; LARS leaves biases and norms as SGD steps
    them, without weight decay, where the code's LARC adapts and decays them too.  As in the code, batch norm takes its
    statistics over all views of one size, the projector's over all views.
    """

    queue: Tensor

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.projector = heads.mlp(encoder.dim, config.hidden_dim, config.projection_dim, last_norm=False)
        self.prototypes = nn.Linear(config.projection_dim, config.num_prototypes, bias=False)
        self.register_buffer("queue", torch.zeros(2, config.queue_size, config.projection_dim))
        self.after_step(self.progress)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """Embeddings (B, projection_dim) of both global views, without gradient, and scores (B, K) of all views.

        The scores are cosines, in fp32 in autocast too.  While prototypes are frozen, their gradient is zero.
        """
        z = self.projector(base.features(self.encoder, batch.views))
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        weight = self.prototypes.weight
        weight = torch.where(self.progress < self.config.freeze_prototypes, weight.detach(), weight)
        with torch.autocast(z.device.type, enabled=False):
            scores = F.linear(z, weight)
        num_views = len(batch.views)
        return *z.detach().chunk(num_views)[:2], *scores.chunk(num_views)

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> base.Step:
        """Cross-entropy of each global view's code with the prediction of every other view (equations 1, 2 and 6).

        Deviation from equation 6, with the paper's code: the mean over pairs of views, not their sum.
        ``prototype_entropy``: entropy of the mean prediction of this rank's views, of log K (0: all take one
        prototype).  ``code_entropy``: mean entropy of codes, of log K (0: hard, 1: uniform).  ``projection_std``:
        spread of the first view's embeddings (0: collapse).
        """
        z1, z2, *scores = embeddings
        distributed.check_same(len(z1), "batch size of SwAV")
        with torch.no_grad(), torch.autocast(z1.device.type, enabled=False):
            codes = self._codes(torch.stack(scores[:2]), progress)
            if self.config.queue_size:
                new = distributed.all_gather(torch.stack([z1, z2], dim=1)).transpose(0, 1)
                self.queue.copy_(torch.cat([new, self.queue], dim=1)[:, : self.config.queue_size])
        predictions = [F.log_softmax(score / self.config.temperature, dim=1) for score in scores]
        pairs = [(i, v) for i in range(2) for v in range(len(scores)) if v != i]
        loss = torch.stack([-(codes[i] * predictions[v]).sum(1).mean() for i, v in pairs]).mean()
        mean_prediction = torch.stack(predictions).detach().exp().mean((0, 1))
        entropies = {"prototype_entropy": _entropy(mean_prediction), "code_entropy": _entropy(codes).mean()}
        return base.Step(loss, {**entropies, "projection_std": base.spread(z1)})

    def late_parameters(self) -> Sequence[Tensor]:
        """The prototypes, which are frozen at first."""
        return (self.prototypes.weight,)

    @torch.no_grad()
    def after_step(self, progress: Tensor) -> None:
        """Prototypes of length 1."""
        weight = self.prototypes.weight
        weight.copy_(torch.where(progress < 1, F.normalize(weight, dim=1), weight))

    def _codes(self, scores: Tensor, progress: Tensor) -> Tensor:
        """Codes (2, B, K) of the global views' scores, with this rank's share of the queue once it is in use."""
        share = self.config.queue_size // distributed.world_size()
        past = self.queue.narrow(1, distributed.rank() * share, share)
        full = self.queue[:, -1:].any()  # an embedding is nowhere 0 in all dimensions, a row not yet filled is
        weight = (full & (progress >= self.config.queue_start)).to(scores.dtype)
        past_scores = past @ self.prototypes.weight.T
        return losses.sinkhorn(scores, self.config.epsilon, self.config.sinkhorn_steps, past_scores, weight)


def _entropy(p: Tensor) -> Tensor:
    """The entropy of distributions (..., K) over log K: (...), fp32."""
    return torch.special.entr(p).sum(-1).float() / math.log(p.shape[-1])
