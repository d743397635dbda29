"""The settings of what a run writes: checkpoints and logs.  Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, and how many are kept."""

    every: int = 1000
    """Write a checkpoint every N steps; 0: only at the end and when the run is stopped."""
    keep: int = 3
    """How many checkpoints to keep: the newest ones."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every: expected 0 or more steps, got {self.every}: 0 is 'at the end'")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep: expected at least 1, got {self.keep}: a restart needs one")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged besides the terminal and metrics.jsonl, and how often."""

    every: int = 20
    """Write a log line every N steps."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases too; online continues offline if the server does not answer."""
    project: str = "sslx"
    """Project in Weights & Biases."""
    wandb_timeout_s: float = 15.0
    """How many seconds to wait for its server at the start and at the end."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every: expected at least 1 step, got {self.every}: 1 logs every step")
