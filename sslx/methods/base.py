"""The base of all methods: embed the views, then compare the embeddings."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn

from sslx.data.batch import Batch
from sslx.data.draws import Draws
from sslx.encoders import Encoder
from sslx.methods import ema


class Embedded(NamedTuple):
    """The inputs of the loss.  The first axis of all tensors is this rank's samples, so that parts of a batch can be
    concatenated.

    compared: float tensors, through which the gradient flows.  given: all other tensors, of any dtypes and without a
    gradient, such as labels, indices, masks or the outputs of a teacher.
    """

    compared: tuple[Tensor, ...]
    given: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Step:
    """loss: scalar with gradient, whose mean over ranks is the full batch's.  metrics: detached scalars."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def features(encoder: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """Return the features of V views (B, C, H, W) as one tensor (V*B, dim), one view after the other.

    Neighbors of one size go through the encoder as one batch, so multi-crop takes one forward for each size.
    """
    sizes = groupby(views, key=lambda view: view.shape[2:])
    return torch.cat([encoder(torch.cat(list(same))) for _, same in sizes])


def full_precision(z: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 if it is in fp64.  Losses are computed in it, in autocast too."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


class Method(nn.Module):
    """A pretraining method around ``self.encoder``.  A method implements ``embed`` and ``loss``.

    progress: () in [0, 1], the fraction of the training that is done, on the device.  Each step sets it; checkpoints do
      not contain it.
    """

    progress: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        self.encoder_average: ema.EncoderAverage | None = None
        self._compiled: Callable[[Batch], Embedded] | None = None

    @property
    def exported(self) -> Encoder:
        """The encoder that users get, and that probes and pictures use."""
        return self.encoder

    @property
    def exported_module(self) -> str:
        """The name of ``exported`` among the method's modules, such as "encoder"."""
        exported = self.exported
        return next(name for name, module in self.named_modules() if module is exported)

    def keep_average(self, momentum: float) -> None:
        """Keep a moving average of the encoder from now on, as a part of the method's state."""
        self.encoder_average = ema.EncoderAverage(self.encoder, momentum)

    def draw(self, draws: Draws) -> tuple[npt.NDArray[Any], ...]:
        """Return the random arrays of a batch (masks, permutations), which come to the device as ``Batch.draws``.

        It runs on the host while images are read.  Arrays from ``draws.per_sample`` begin with the axis of the
        samples; those from ``draws.per_step`` are the same on all ranks.
        """
        del draws
        return ()

    def embed(self, batch: Batch) -> Embedded:
        """Return the inputs of the loss.  Everything with parameters runs here, and may be compiled."""
        raise NotImplementedError

    def loss(self, embedded: Embedded) -> Step:
        """Return the loss of the embeddings of all ranks, by the gradient convention of the README beside this file."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Update moving averages and the like; called after each optimizer step.

        After a step that was not taken because it was not finite, ``progress`` is 1.  Then this must not change
        anything; a moving average's momentum is 1 there.
        """

    def forward(self, batch: Batch, cotangents: Sequence[Tensor] | None = None) -> Step:
        """Return the ``Step`` of a batch.

        cotangents: those of gradient caching, which calls ``forward`` because DDP only sees such calls.
        """
        embedded = self.embedder(batch)
        return self.loss(embedded) if cotangents is None else linearized(embedded, cotangents)

    @property
    def embedder(self) -> Callable[[Batch], Embedded]:
        """``embed``, compiled if ``compile_embed`` was called."""
        return self._compiled or self.embed

    def compile_embed(self) -> None:
        """Compile ``embed`` with torch.compile, which happens in the first step."""
        self._compiled = torch.compile(self.embed)

    @contextmanager
    def eager(self) -> Generator[None]:
        """Run ``embed`` uncompiled in the context, for code that counts its operations."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    def picture(self, batch: Batch) -> tuple[tuple[str, Tensor], ...]:
        """Return the pictures of unaugmented images for ``sslx plot``: titles and normalized rows (B, C, H, W).

        The default is none.
        """
        del batch
        return ()

    def late_parameters(self) -> Sequence[Tensor]:
        """Return the parameters that are frozen at first by a gradient of zeros.

        AdamW counts their steps from their first gradient on.
        """
        return ()


def linearized(embedded: Embedded, cotangents: Sequence[Tensor]) -> Step:
    """Return a scalar whose gradient with respect to ``embedded.compared`` is ``cotangents`` (arXiv 2101.06983)."""
    products = [(z * cotangent).sum() for z, cotangent in zip(embedded.compared, cotangents, strict=True)]
    return Step(torch.stack(products).sum())
