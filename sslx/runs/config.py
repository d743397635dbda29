"""Settings for what a run writes: checkpoints and logs.  Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to write checkpoints, and how many to keep."""

    every: int = 1000
    """Write a checkpoint every N steps; 0 writes one only at the end and when the run is stopped."""
    keep: int = 3
    """Number of newest checkpoints to keep."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(
                f"checkpoint.every: expected 0 or more steps, got {self.every}: use 0 to save only at the end"
            )
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep: expected at least 1, got {self.keep}: a restart needs one checkpoint")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What to log besides the terminal output and metrics.jsonl, and how often."""

    every: int = 20
    """Write a log line every N steps."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Also log to Weights & Biases; online falls back to offline if the server does not answer."""
    project: str = "sslx"
    """Name of the project in Weights & Biases."""
    wandb_timeout_s: float = 15.0
    """Seconds to wait for the Weights & Biases server at the start and at the end."""
    tensorboard: bool = False
    """Also write event files for TensorBoard to the run folder, which needs the package tensorboard."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every: expected at least 1 step, got {self.every}: use 1 to log every step")


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Where commands that measure a run put their results, besides the run folder."""

    wandb: Literal["auto", "off", "online", "offline"] = "auto"
    """Also add the results to the run in Weights & Biases.  auto: if the run logged to it, in the same mode."""

    def log_of(self, run: LogConfig) -> LogConfig:
        """Return the settings with which results go to the trackers of a run that logged with ``run``."""
        return run if self.wandb == "auto" else replace(run, wandb=self.wandb)
