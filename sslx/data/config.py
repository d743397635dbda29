"""The settings of the data: how images are read.  Imports neither numpy nor torch, for help and flags."""

import math
from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """How images are read."""

    size: int | None = None
    """Side of the training views in pixels.  Default: that of most images, up to 224; without a GPU, up to 96."""
    eval_size: int | None = None
    """Side of the images that probes see, in pixels.  Default: the same as --data.size."""
    backend: Literal["auto", "dali", "torchvision", "resident", "synthetic"] = "auto"
    """auto: DALI if installed.  resident: decode once, keep in memory.  synthetic: repeat one batch, for benchmarks."""
    threads: int | None = None
    """Loader threads (DALI) or processes (torchvision) per rank.  Default: the machine's cores / its ranks."""
    max_bad: float = 0.01
    """Stop if more than this fraction of the images is unreadable; otherwise replace them and report how many."""
    range: Literal["auto"] | tuple[float, float] = "auto"
    """LOW HIGH: black and white of images with more than 8 bits, signed or float.  auto: measured on 256 of them."""
    timeout_s: float = 300.0
    """Give up waiting for data when no worker, disk or mount shows a sign of life for so many seconds."""

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("eval-size", self.eval_size)):
            if value is not None and value < 8:
                raise ConfigError(f"--data.{name} must be at least 8 pixels, not {value}")
        if not 0 <= self.max_bad <= 1:
            raise ConfigError(f"--data.max-bad is a share in [0, 1], not {self.max_bad}")
        if self.threads is not None and self.threads < 0:
            raise ConfigError(f"--data.threads must be 0 or more, not {self.threads}")
        if not self.timeout_s > 0:
            raise ConfigError(f"--data.timeout-s must be above 0 seconds, not {self.timeout_s:g}")
        if self.range != "auto" and not (all(map(math.isfinite, self.range)) and self.range[0] < self.range[1]):
            raise ConfigError(f"--data.range takes two finite numbers, black below white, not {self.range}")
