"""The settings of the probes.  Imports no torch."""

from dataclasses import dataclass

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
    num_draws: int = 20
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
        if self.num_draws < 1:
            raise ConfigError(f"probe.num_draws: expected 1 or more, got {self.num_draws}")
        if self.seed < 0:
            raise ConfigError(f"probe.seed: expected 0 or more, got {self.seed}")
