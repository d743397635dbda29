"""The settings of the probes, of the health of the features, of the online probe.  Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which probes to run, and how."""

    k: int = 200
    """Neighbors that vote in the kNN probe, at most the mean size of a class; 0 leaves the probe out."""
    temperature: float = 0.07
    """Temperature of the kNN votes' weights, exp(similarity / temperature)."""
    linear: bool = True
    """Fit a linear classifier on all training labels (the slowest probe)."""
    shots: tuple[int, ...] = (1, 5)
    """Labels per class of the few-label probes; give none to leave them out."""
    draws: int = 20
    """How many random draws of labeled images a few-label score averages over."""
    seed: int = 0
    """Seed of those draws, and of the training images held out to choose the regularization."""

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"probe.k: expected 1 or more, or 0 for no kNN probe, got {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"probe.temperature: expected a number above 0 (0.07), got {self.temperature}")
        if any(shots < 1 for shots in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ConfigError(f"probe.shots: expected different numbers of 1 or more, got {self.shots}")
        if self.draws < 1:
            raise ConfigError(f"probe.draws: expected 1 or more, got {self.draws}")
        if self.seed < 0:
            raise ConfigError(f"probe.seed: expected 0 or more, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Label-free health of the features during training: rank, std, alignment, uniformity."""

    every: int = 200
    """Check the features every N steps and at the end; 0 turns it off."""
    samples: int = 512
    """Most images of a step to look at, over all ranks."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the features collapse (become alike): warn, or stop with exit code 77."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 2:
            raise ConfigError("health.every must be 0 or more, health.samples at least 2")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """kNN accuracy during training."""

    every: int = 10
    """Measure kNN accuracy every N epochs, if there are labels; 0 turns it off."""
    bank: int = 10_000
    """Most labeled training images to compare with."""
    queries: int = 2_000
    """Most images to classify: of the test split or, if there is none, training images that are not compared with."""

    def __post_init__(self) -> None:
        if self.every < 0 or min(self.bank, self.queries) < 2:
            raise ConfigError("online.every must be 0 or more, online.bank and online.queries at least 2")
