"""An encoder's architecture as plain data, enough to build it again and to export it.  Does not import torch."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sslx.errors import ConfigError

Stem = Literal["imagenet", "small", "narrow"]
Norm = Literal["batch", "sync", "group"]
"""batch: batch norm over each rank's samples.  sync: batch norm over the samples of all ranks.  group: group norm."""
_REFUSED_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
                  "features_only", "num_classes", "in_chans")  # fmt: skip
"""Arguments of ``timm.create_model`` that load or download weights, or that other fields of a recipe determine."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The architecture of an encoder, without its weights.

    Save it as JSON with ``json.dumps(dataclasses.asdict(recipe))`` and read it with ``Recipe(**json.loads(text))``.
    The mean and standard deviation by which images are normalized belong to the view, not to the encoder.

    Raises ConfigError for arguments that JSON cannot hold unchanged or that a recipe must not have.
    """

    name: str
    """Name of the model in timm."""
    size: int
    """Side of the views that the encoder is built for, in pixels."""
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of ``timm.create_model``: patch_size, img_size, depth, class_token, ..."""
    stem: Stem = "imagenet"
    """imagenet: timm's own stem.  small, narrow: a 3x3 convolution with stride 1 in place of a ResNet's stem."""
    norm: Norm = "batch"
    """Norm that replaces timm's batch norms.  The method's heads use the same norm."""
    channels: int = 3
    """Number of channels of the images."""

    def __post_init__(self) -> None:
        if self.stem not in get_args(Stem) or self.norm not in get_args(Norm):
            raise ConfigError(
                f"expected a stem among {', '.join(get_args(Stem))} and a norm among {', '.join(get_args(Norm))}, "
                f"got {self.stem!r} and {self.norm!r}"
            )
        if self.size < 1 or self.channels < 1:
            raise ConfigError(
                f"expected an encoder's size and number of channels to be at least 1, "
                f"got {self.size} and {self.channels}"
            )
        if refused := [name for name in _REFUSED_ARGUMENTS if name in self.arguments]:
            raise ConfigError(f"an encoder's recipe must not set {refused[0]} of timm.create_model: remove it")
        try:
            unchanged = json.loads(json.dumps(self.arguments)) == self.arguments
        except (TypeError, ValueError):
            unchanged = False
        if not unchanged:
            raise ConfigError(
                "expected the arguments in an encoder's recipe to be plain JSON (numbers, strings, lists and objects), "
                f"got {self.arguments}"
            )
