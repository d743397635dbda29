"""The settings of what is watched while an encoder trains.  Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Label-free health of the features during training: rank, std, alignment, uniformity."""

    every: int = 200
    """Check the features every N steps and at the end; 0 turns it off."""
    num_samples: int = 512
    """Most images of a step to look at, over all ranks."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the features collapse (become alike): warn, or stop with exit code 77."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.num_samples < 2:
            raise ConfigError("health.every must be 0 or more, health.num_samples at least 2")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """kNN accuracy during training."""

    every: int = 1000
    """Measure kNN accuracy every N steps and at the end, if there are labels; 0 turns it off."""
    num_references: int = 10_000
    """Most labeled training images to compare with."""
    num_queries: int = 2_000
    """Most images to classify: of the test split or, if there is none, training images that are not compared with."""

    def __post_init__(self) -> None:
        if self.every < 0 or min(self.num_references, self.num_queries) < 2:
            raise ConfigError("online.every must be 0 or more, online.num_references and online.num_queries at least 2")
