"""The settings of the data: which images to read, and how.  Imports neither numpy nor torch, for help and flags."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sslx.data.splits import Choice
from sslx.errors import ConfigError

NAMES = Literal["digits", "cifar10", "cifar100", "fashion_mnist", "stl10", "folder", "synthetic"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which images to read."""

    source: NAMES = "digits"
    """digits comes with scikit-learn; folder takes your own images; the others are torchvision's data sets."""
    root: Path | None = None
    """Folder of the images (folder) or of the downloaded data set (cifar10, ...; default ~/.cache/sslx)."""
    test_root: Path | None = None
    """Folder of the images to test probes on; default: the subfolder of root named test, val or the like."""
    splits: Choice = "auto"
    """Subfolders named train, test, val, ...: splits where that is safe (auto), always (folders), never (none)."""
    download: bool = False
    """Download the data set where it is missing."""
    range: Literal["auto"] | tuple[float, float] = "auto"
    """LOW HIGH: black and white of images of over 8 bits, signed or float; auto: what 256 of them use, as it says."""
    num_synthetic: int = 4096
    """Images of the synthetic source."""
    timeout_s: float = 300.0
    """Seconds without a sign of life from a worker, disk or mount after which a wait for data ends."""

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"--data.timeout-s must be above 0 seconds, not {self.timeout_s:g}")
        if self.range != "auto" and not (all(map(math.isfinite, self.range)) and self.range[0] < self.range[1]):
            raise ConfigError(f"--data.range takes two finite numbers, black below white, not {self.range}")


@dataclass(frozen=True, kw_only=True)
class Config(SourceConfig):
    """Which images to read, and how."""

    size: int | None = None
    """Side of the training views in pixels; default: what suits the source (digits and CIFAR 32, folder 224)."""
    eval_size: int | None = None
    """Side of the probes' views in pixels; default: the same as size."""
    backend: Literal["auto", "dali", "torchvision", "resident", "synthetic"] = "auto"
    """auto: DALI if installed.  resident: decoded once, kept in memory.  synthetic: one batch for ever, to measure."""
    threads: int | None = None
    """Loader threads (DALI) or processes (torchvision) a rank; default: the machine's cores / ranks on it."""
    max_bad: float = 0.01
    """Share of unreadable images above which the run ends; fewer are replaced by others and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("size", self.size), ("eval-size", self.eval_size)):
            if value is not None and value < 8:
                raise ConfigError(f"--data.{name} must be at least 8 pixels, not {value}")
        if not 0 <= self.max_bad <= 1:
            raise ConfigError(f"--data.max-bad is a share in [0, 1], not {self.max_bad}")
        if self.threads is not None and self.threads < 0:
            raise ConfigError(f"--data.threads must be 0 or more, not {self.threads}")
