"""What an encoder is built from: enough to build it again and to export it.  Imports no torch."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sslx.errors import ConfigError

Stem = Literal["imagenet", "small", "narrow"]
Norm = Literal["batch", "sync", "group"]
"""Batch norm over the samples of a rank, batch norm over those of all ranks, or group norm."""
_NOT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
                  "features_only", "num_classes", "in_chans")  # fmt: skip
"""Arguments of ``timm.create_model`` that load or download weights, or that a recipe settles by other means."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The architecture of an encoder, without its weights.

    ``dataclasses.asdict`` makes JSON of it, and ``Recipe(**json.loads(text))`` reads that.  The mean and the standard
    deviation that images are normalized by belong to the view, not to the encoder.

    Raises ConfigError for arguments that JSON changes or that a recipe must not have.
    """

    name: str
    """The model's name in timm."""
    size: int
    """Side of the views that the encoder is built for, in pixels."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of ``timm.create_model``: patch_size, img_size, depth, class_token, ..."""
    stem: Stem = "imagenet"
    """imagenet: as timm builds it.  small, narrow: a 3x3 convolution of stride 1 in place of a ResNet's stem."""
    norm: Norm = "batch"
    """What takes the place of timm's batch norms; the heads of a method have the same norm."""
    channels: int = 3
    """Number of channels of the images."""

    def __post_init__(self) -> None:
        if self.stem not in get_args(Stem) or self.norm not in get_args(Norm):
            raise ConfigError(f"an encoder has no stem {self.stem!r} with norm {self.norm!r}")
        if self.size < 1 or self.channels < 1:
            raise ConfigError(
                f"an encoder needs a size and a number of channels of at least 1, got {self.size} and {self.channels}"
            )
        if refused := [name for name in _NOT_ARGUMENTS if name in self.arguments]:
            raise ConfigError(f"the recipe of an encoder must not have the argument {refused[0]} of timm.create_model")
        try:
            unchanged = json.loads(json.dumps(self.arguments)) == self.arguments
        except (TypeError, ValueError):
            unchanged = False
        if not unchanged:
            raise ConfigError(
                "the recipe of an encoder takes arguments that JSON can hold (numbers, text, lists and tables), "
                f"got {self.arguments}"
            )
