"""Settings of the probes.  This module does not import torch, so that --help and flag errors are fast."""

from dataclasses import dataclass

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The probes to run and their settings."""

    k: int = 200
    """Number of neighbors that vote in the kNN probe, at most the mean size of a class; 0 disables the probe."""
    temperature: float = 0.07
    """Temperature of the weights of kNN votes, exp(similarity / temperature)."""
    linear: bool = True
    """Fit a linear classifier on all training labels (the slowest probe)."""
    shots: tuple[int, ...] = (1, 5)
    """Labels per class in the few-label probes, one probe for each number.  An empty list disables them."""
    num_draws: int = 20
    """Number of random draws of labeled images that a few-label score averages over."""
    seed: int = 0
    """Seed of these draws, and of the training images that are held out to choose the regularization."""

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"probe.k: expected 1 or more, or 0 to disable the kNN probe, got {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"probe.temperature: expected a positive number, such as 0.07, got {self.temperature}")
        if any(shots < 1 for shots in self.shots) or len(set(self.shots)) < len(self.shots):
            raise ConfigError(f"probe.shots: expected distinct numbers of 1 or more, got {self.shots}")
        if self.num_draws < 1:
            raise ConfigError(f"probe.num_draws: expected 1 or more, got {self.num_draws}")
        if self.seed < 0:
            raise ConfigError(f"probe.seed: expected 0 or more, got {self.seed}")
