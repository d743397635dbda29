"""The settings of an augmentation.  This module imports neither numpy nor torch, so that flags and help are fast."""

import math
from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError

_PROBABILITIES = (
    "flip", "jitter", "gray", "blur", "solarize", "vertical_flip", "right_angles", "rotate", "gain", "noise"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Augment:
    """A recipe's augmentation.  The defaults are SimCLR's for ImageNet."""

    min_scale: float = 0.08
    """Smallest fraction of the image's area that a crop may cover (SimCLR: 0.08; 0.2 keeps more of small images)."""
    max_scale: float = 1.0
    """Largest fraction of the image's area that a crop may cover."""
    max_ratio: float = 4 / 3
    """Crops have aspect ratios between 1/max_ratio and max_ratio."""
    flip: float = 0.5
    """Probability of a horizontal flip; take 0 where left and right mean different things (digits, text)."""
    jitter: float = 0.8
    """Probability of color jitter."""
    brightness: float = 0.8
    """Strength s of the brightness jitter: a factor uniform in [max(0, 1 - s), 1 + s]."""
    contrast: float = 0.8
    """Strength of the contrast jitter, as for brightness."""
    saturation: float = 0.8
    """Strength of the saturation jitter, as for brightness."""
    hue: float = 0.2
    """Strength s of the hue jitter: a shift uniform in [-s, s] turns of the color circle, at most 0.5."""
    gray: float = 0.2
    """Probability of turning the view gray."""
    blur: float = 0.5
    """Probability of a Gaussian blur with sigma in [0.1, 2] pixels."""
    solarize: float = 0.0
    """Probability of inverting all values of 128 and above (BYOL: 0.2 on the second view)."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter that resizes the crop, antialiased."""
    vertical_flip: float = 0.0
    """Probability of a vertical flip, for images without an up and a down, such as cells or the ground from above."""
    right_angles: float = 0.0
    """Probability of a rotation by 90, 180 or 270 degrees, each equally likely."""
    rotate: float = 0.0
    """Probability of a rotation by any angle up to max_angle.  The corners show the view mirrored at its border."""
    max_angle: float = 30.0
    """Largest angle of such a rotation in degrees, in either direction; with 180, all angles are equally likely."""
    gain: float = 0.0
    """Probability of a gain, which multiplies each channel by a factor of its own."""
    gain_strength: float = 0.2
    """Strength s of the gain: factors uniform in [max(0, 1 - s), 1 + s]."""
    noise: float = 0.0
    """Probability of Gaussian noise, drawn for each pixel and channel."""
    max_noise: float = 0.1
    """Largest standard deviation of the noise, as a fraction of full scale; that of a view is uniform up to it."""

    def __post_init__(self) -> None:
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} must be a probability in [0, 1], not {getattr(self, name)}")
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ConfigError(
                f"augment needs 0 < min_scale <= max_scale <= 1, got {self.min_scale} and {self.max_scale}"
            )
        if self.max_ratio < 1 or not 0 <= self.hue <= 0.5 or min(self.brightness, self.contrast, self.saturation) < 0:
            raise ConfigError("augment needs max_ratio >= 1, hue in [0, 0.5] and jitter strengths >= 0")
        if not 0 < self.max_angle <= 180:
            raise ConfigError(f"augment.max_angle must be above 0 and at most 180 degrees, not {self.max_angle}")
        if not 0 <= self.gain_strength < math.inf:
            raise ConfigError(f"augment.gain_strength must be a number of at least 0, not {self.gain_strength}")
        if not 0 <= self.max_noise <= 1:
            raise ConfigError(f"augment.max_noise must be a fraction of full scale in [0, 1], not {self.max_noise}")
