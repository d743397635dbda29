"""The settings of the monitoring of an encoder while it trains.  Does not import torch."""

from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Label-free health of the features during training: rank, standard deviation, alignment and uniformity."""

    every: int = 200
    """Check the features every N steps and at the end; 0 turns it off."""
    num_samples: int = 512
    """Maximum number of images of a step to measure, over all ranks."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the features of all images become the same: warn, or stop with exit code 77."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.num_samples < 2:
            raise ConfigError(
                "health.every must be 0 or more and health.num_samples at least 2, got "
                f"{self.every} and {self.num_samples}: change --health.every or --health.num-samples"
            )


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """The kNN accuracy during training."""

    every: int = 1000
    """Measure the kNN accuracy every N steps and at the end, if there are labels; 0 turns it off."""
    num_references: int = 10_000
    """Maximum number of labeled training images to compare with."""
    num_queries: int = 2_000
    """Maximum number of images to classify, of the test split or, if there is none, held-out training images."""

    def __post_init__(self) -> None:
        if self.every < 0 or min(self.num_references, self.num_queries) < 2:
            raise ConfigError(
                "online.every must be 0 or more, and online.num_references and online.num_queries at least 2, got "
                f"{self.every}, {self.num_references} and {self.num_queries}: change the one that is too small"
            )
