"""The settings for reading images.  This module imports neither numpy nor torch, so that flags and help are fast."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings for reading images."""

    size: int | None = None
    """Side of the training views in pixels.  Default: the side of most images, up to 224, or up to 96 without a GPU."""
    eval_size: int | None = None
    """Side of the images for the probes, in pixels.  Default: the same as --data.size."""
    backend: Literal["auto", "dali", "torchvision", "resident", "synthetic"] = "auto"
    """auto: DALI if installed.  resident: decode once, keep in memory.  synthetic: repeat one random batch."""
    threads: int | None = None
    """Loader threads (DALI) or processes (torchvision) per rank.  Default: the machine's cores / its ranks."""
    prefetch: int | None = None
    """Batches per rank to prepare ahead of time, at most.  Default: 2 (DALI, 3 on a GPU), or 2 per process."""
    max_bad: float = 0.01
    """Stop if more than this fraction of the images is unreadable; otherwise replace them and report how many."""
    exclude: Path | None = None
    """List of images, a path in each line, that a run never reads: others take their places, and nothing else moves."""
    range: Literal["auto"] | tuple[float, float] = "auto"
    """LOW HIGH: black and white of images with more than 8 bits, signed or float.  auto: measure on 256 images."""
    channels: int | None = None
    """Number of channels, 1 for gray, read with all bits.  Default: as the source says, or RGB of 8 bits for files."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, of values from 0 to 1.  Default: ImageNet's for RGB, else measured on 256 images."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel.  sslx data stats measures both on all images."""
    page: int = 0
    """Page of each TIFF, or frame of each DICOM file, that is read, counted from 0.  Other files have one image."""
    timeout_s: float = 300.0
    """Give up waiting for data after this many seconds without progress by any worker, disk or mount."""

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("eval-size", self.eval_size)):
            if value is not None and value < 8:
                raise ConfigError(f"--data.{name} must be at least 8 pixels, not {value}")
        if not 0 <= self.max_bad <= 1:
            raise ConfigError(f"--data.max-bad must be a fraction in [0, 1], not {self.max_bad}")
        if self.threads is not None and self.threads < 0:
            raise ConfigError(f"--data.threads must be 0 or more, not {self.threads}")
        if self.channels is not None and self.channels < 1:
            raise ConfigError(f"--data.channels must be at least 1, not {self.channels}")
        if len(self.mean) != len(self.std):
            raise ConfigError(
                f"--data.mean and --data.std need a number for each channel, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std, default=1) <= 0:
            raise ConfigError("--data.mean and --data.std must be finite numbers, the standard deviations above 0")
        if self.page < 0:
            raise ConfigError(f"--data.page must be 0 for the first page, 1 for the second, ..., not {self.page}")
        if self.prefetch is not None and not 1 <= self.prefetch <= 1000:
            raise ConfigError(f"--data.prefetch must be from 1 to 1000 batches, not {self.prefetch}")
        if not self.timeout_s > 0:
            raise ConfigError(f"--data.timeout-s must be above 0 seconds, not {self.timeout_s:g}")
        if self.range != "auto" and not (all(map(math.isfinite, self.range)) and self.range[0] < self.range[1]):
            raise ConfigError(f"--data.range must be two finite numbers, black below white, not {self.range}")
