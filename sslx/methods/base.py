"""What every method is: embed the views, compare the embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.methods.config import MethodConfig as MethodConfig


@dataclass(frozen=True, eq=False)
class Step:
    """loss: scalar with gradient, whose mean over ranks is the full batch's.  metrics: detached scalars."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


@torch.no_grad()
def spread(z: Tensor) -> Tensor:
    """How far apart this rank's embeddings (B, D) point: their standard deviation a dimension, at length 1, times
    sqrt(D).  (), fp32: 1 where they are uniform on the sphere, 0 where they have collapsed to a point, nan of one."""
    unit = F.normalize(z.float(), dim=1)
    if len(unit) < 2:
        return unit.new_full((), torch.nan)
    return unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5


def features(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """The features of V views (B, 3, H, W) as one (V*B, dim), one view after the other.

    Neighbours of one size go through the encoder as one batch, so multi-crop takes one forward a size.
    """
    sizes = groupby(views, key=lambda view: view.shape[2:])
    return torch.cat([encoder(torch.cat(list(same))) for _, same in sizes])


class Method(nn.Module):
    """A pretraining method around ``self.encoder``.  The loop and DDP call ``forward`` and nothing else in a step.

    num_draws: random numbers that it takes for each sample of a batch, as ``Batch.draws``.
    progress: () in [0, 1], that of the present step, for an ``embed`` that depends on it; in no checkpoint.
    """

    encoder: Encoder
    num_draws: int = 0
    progress: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def embed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The embeddings that the loss compares.  Everything with parameters runs here; it may be compiled."""
        raise NotImplementedError

    def loss(self, embeddings: tuple[Tensor, ...], progress: Tensor) -> Step:
        """The loss of the embeddings of all ranks; progress: () in [0, 1], the share of training that is done."""
        raise NotImplementedError

    def forward(self, batch: Batch, progress: Tensor, cotangents: tuple[Tensor, ...] | None = None) -> Step:
        """``loss`` of ``embed``; given gradients of the embeddings, a scalar with just those (gradient caching)."""
        self.progress.copy_(progress)
        embeddings = self.embed(batch)
        if cotangents is None:
            return self.loss(embeddings, progress)
        return Step(torch.stack([(e * c).sum() for e, c in zip(embeddings, cotangents, strict=True)]).sum())

    @property
    def exported(self) -> Encoder:
        """The encoder that users get: what is probed, drawn and exported."""
        return self.encoder

    @property
    def exported_name(self) -> str:
        """The name of ``exported`` among the method's modules, such as "encoder"."""
        exported = self.exported
        return next(name for name, module in self.named_modules() if module is exported)

    def after_step(self, progress: Tensor) -> None:
        """Called after each optimizer step: EMA updates.  With a progress of 1, after a step that was not taken because
        it was not finite, it changes nothing: there a moving average's momentum is 1."""

    def picture(self, batch: Batch) -> tuple[tuple[str, Tensor], ...]:
        """What ``sslx plot`` shows of the method on unaugmented images: titled rows of (B, 3, H, W), normalised.

        Empty where there is nothing to see but features.
        """
        del batch
        return ()

    def late_parameters(self) -> Sequence[Tensor]:
        """Parameters that are frozen at first, by a gradient of zeros: AdamW starts to count when they thaw."""
        return ()
