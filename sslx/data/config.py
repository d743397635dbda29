"""The settings of the data: which images to read, and how.  Imports neither numpy nor torch, for help and flags."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.data.sources.splits import Choice
from sslx.errors import ConfigError

NAMES = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "stl10", "folder", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which images to read."""

    source: NAMES = "digits"
    """Where images come from.  folder: your own; digits: part of scikit-learn; the others: torchvision's datasets."""
    root: Path | None = None
    """Folder of your images, or of a downloaded dataset (cifar10, ...; default ~/.cache/sslx)."""
    test_root: Path | None = None
    """Folder of the images to test on.  Default: a subfolder of the root named test, val or similar."""
    splits: Choice = "auto"
    """Are subfolders named train, test, val, ... splits?  Where that is safe (auto), always (folders), never (none)."""
    download: bool = False
    """Download the dataset if it is missing."""
    range: Literal["auto"] | tuple[float, float] = "auto"
    """LOW HIGH: black and white of images with more than 8 bits, signed or float.  auto: measured on 256 of them."""
    num_synthetic: int = 4096
    """Number of images of the synthetic source."""
    timeout_s: float = 300.0
    """Give up waiting for data when no worker, disk or mount shows a sign of life for so many seconds."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"--data.timeout-s must be above 0 seconds, not {self.timeout_s:g}")
        if self.range != "auto" and not (all(map(math.isfinite, self.range)) and self.range[0] < self.range[1]):
            raise ConfigError(f"--data.range takes two finite numbers, black below white, not {self.range}")


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """Which images to read, and how."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("size", self.size), ("eval-size", self.eval_size)):
            if value is not None and value < 8:
                raise ConfigError(f"--data.{name} must be at least 8 pixels, not {value}")
        if not 0 <= self.max_bad <= 1:
            raise ConfigError(f"--data.max-bad is a share in [0, 1], not {self.max_bad}")
        if self.threads is not None and self.threads < 0:
            raise ConfigError(f"--data.threads must be 0 or more, not {self.threads}")
