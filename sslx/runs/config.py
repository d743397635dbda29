"""The settings of what a run writes: checkpoints and logs.  Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from sslx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000
    """Steps between checkpoints; 0: only at the end and when the job is stopped."""
    keep: int = 3
    """How many checkpoints to keep: the newest ones."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every: expected 0 or more steps, got {self.every}: 0 is 'at the end'")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep: expected at least 1, got {self.keep}: a restart needs one")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged, how often, and where to besides the terminal and metrics.jsonl."""

    every: int = 20
    """Steps between two log lines."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; online goes on offline where the server does not answer."""
    project: str = "sslx"
    """The wandb project."""
    wandb_timeout_s: float = 15.0
    """Seconds to wait for the wandb server at the start and at the end."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every: expected at least 1 step, got {self.every}: 1 logs every step")
