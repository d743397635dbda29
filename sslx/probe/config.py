"""Settings of the probes.  This module does not import torch, so that --help and flag errors are fast."""

from dataclasses import dataclass

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The probes to run and their settings."""

    k: tuple[int, ...] = (5, 10, 20, 100, 200)
    """Numbers of neighbors in the kNN probe, of which held-out training images choose one.  Empty: no kNN probe."""
    temperature: float = 0.07
    """Temperature of the weights of kNN votes, exp(similarity / temperature)."""
    linear: bool = True
    """Fit a linear classifier on all training labels by L-BFGS."""
    sgd: bool = False
    """Fit it by SGD as well, for 100 epochs, as papers do (the slowest probe)."""
    shots: tuple[int, ...] = (1, 5, 10)
    """Labels per class in the few-label probes, one probe for each number.  An empty list disables them."""
    fractions: tuple[float, ...] = (0.01, 0.1)
    """Fractions of the labels in further few-label probes.  An empty list disables them."""
    num_draws: int = 20
    """Number of random draws of labeled images that a score with few labels per class averages over."""
    num_fraction_draws: int = 5
    """Number of random draws that a score with a fraction of the labels averages over."""
    fine_tune: tuple[float, ...] = ()
    """Fractions of the labels on which to fine-tune all weights, such as 0.01 0.1 1.  Slow; by default none."""
    fine_tune_epochs: int = 30
    """Epochs of fine-tuning; it takes 200 steps if these are more."""
    fine_tune_batch_size: int = 256
    """Images per step of fine-tuning on all ranks together; at most a quarter of the labeled images."""
    fine_tune_lrs: tuple[float, ...] = ()
    """Peak learning rates to choose from, for a batch of 256.  Default: a paper's, a quarter and four times of it."""
    num_fine_tune_draws: int = 3
    """Number of random draws of labeled images that a score of fine-tuning on a fraction averages over."""
    seed: int = 0
    """Seed of all draws, and of the training images that are held out to choose the settings of probes."""
    label_free: bool = True
    """Measure scores that need no labels, where there are labels too."""
    num_views: int = 10
    """Augmented views of each image in the scores without labels.  LiDAR's authors use 10 to 50."""
    cache_gb: float = 4.0
    """Maximum size of the features that the run folder keeps for the next probe, in GB; 0 keeps none."""

    def __post_init__(self) -> None:
        for name, numbers in (("k", self.k), ("shots", self.shots)):
            if any(number < 1 for number in numbers) or len(set(numbers)) < len(numbers):
                raise ConfigError(
                    f"probe.{name}: expected distinct numbers of 1 or more, got {numbers}: to disable the probe, "
                    f"write --probe.{name} without a number"
                )
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"probe.temperature: expected a positive number, such as 0.07, got {self.temperature}")
        if any(not 0 < part < 1 for part in self.fractions) or len(set(self.fractions)) < len(self.fractions):
            raise ConfigError(
                f"probe.fractions: expected distinct numbers between 0 and 1, such as 0.1, got {self.fractions}"
            )
        if any(not 0 < part <= 1 for part in self.fine_tune) or len(set(self.fine_tune)) < len(self.fine_tune):
            raise ConfigError(
                f"probe.fine-tune: expected distinct numbers above 0 and at most 1, such as 0.1, got {self.fine_tune}"
            )
        if any(not 0 < lr < float("inf") for lr in self.fine_tune_lrs):
            raise ConfigError(f"probe.fine-tune-lrs: expected positive numbers, such as 0.05, got {self.fine_tune_lrs}")
        for name, number, minimum in (
            ("num-draws", self.num_draws, 1),
            ("num-fraction-draws", self.num_fraction_draws, 1),
            ("fine-tune-epochs", self.fine_tune_epochs, 1),
            ("fine-tune-batch-size", self.fine_tune_batch_size, 2),
            ("num-fine-tune-draws", self.num_fine_tune_draws, 1),
            ("seed", self.seed, 0),
            ("num-views", self.num_views, 2),
        ):
            if number < minimum:
                raise ConfigError(f"probe.{name}: expected {minimum} or more, got {number}")
        if not 0 <= self.cache_gb < float("inf"):
            raise ConfigError(f"probe.cache-gb: expected a size in GB, or 0 for no cache, got {self.cache_gb}")
