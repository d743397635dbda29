"""Rotation (RotNet; Gidaris, Singh, Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations",
arXiv 1803.07728).

One view of each image goes through the encoder in all four rotations by multiples of 90 degrees; a linear head says
which rotation it was, trained by cross-entropy (equations 2 and 3).  The rotations move pixels and interpolate
nothing.  The paper's augmentation (crop and flip, nothing photometric) belongs in the recipe.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.encoders import Encoder
from sslx.errors import ConfigError
from sslx.methods import base
from sslx.methods.config import MethodConfig

if TYPE_CHECKING:
    from sslx.data.views import Inputs

NUM_ROTATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
    """Rotation has no settings besides its name: it has four rotations and a linear classifier."""

    num_views: ClassVar = 1
    name: Literal["rotation"] = "rotation"

    def inputs(self, augment: Augment, size: int) -> "Inputs":
        """Return the recipe's view.  Raises ConfigError if its augmentation turns images by what is to be predicted."""
        if augment.right_angles or augment.vertical_flip or (augment.rotate and augment.max_angle > 45):
            raise ConfigError(
                "rotation predicts by how many right angles an image was turned, which needs upright images: set "
                "augment.right_angles and augment.vertical_flip to 0, and augment.max_angle to at most 45"
            )
        return super().inputs(augment, size)

    def build(self, encoder: "Encoder") -> "Method":
        return Method(self, encoder)


class Method(base.Method):
    """Encoder and a linear classifier of rotations."""

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.config = config
        self.head = nn.Linear(encoder.dim, NUM_ROTATIONS)

    def embed(self, batch: Batch) -> base.Embedded:
        """Return the logits of the images turned by 0, 90, 180 and 270 degrees counter-clockwise: four (B, 4) tensors.

        All 4B images go through the encoder as one batch, rotation-major.
        """
        (view,) = batch.views
        return base.Embedded(self.head(self.encoder(rotations(view))).chunk(NUM_ROTATIONS))

    def loss(self, embedded: base.Embedded) -> base.Step:
        """Return the cross-entropy; ``accuracy`` is the share of rotations that are recognized (0.25 by chance).

        It is a mean over this rank's images, none of which depends on another, so the mean over ranks is the batch's.
        """
        logits = base.full_precision(torch.stack(embedded.compared))
        rotation = torch.arange(NUM_ROTATIONS, device=logits.device).repeat_interleave(logits.shape[1])
        logits = logits.flatten(0, 1)
        accuracy = (logits.detach().argmax(1) == rotation).float().mean()
        return base.Step(F.cross_entropy(logits, rotation), {"accuracy": accuracy})


def rotations(images: Tensor) -> Tensor:
    """Return the four rotations of images (B, C, S, S): (4B, C, S, S), rotation-major, channels_last.

    Image b turned counter-clockwise by k quarters is number k * B + b.
    """
    last = images.permute(0, 2, 3, 1)  # rot90 of NCHW would lose channels_last
    return torch.cat([last.rot90(k, (1, 2)) for k in range(NUM_ROTATIONS)]).permute(0, 3, 1, 2)
