"""The resources and Slurm options that a job requests: nodes, GPUs, time and site-specific settings."""

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from sslx.config import flags
from sslx.config.parser import parse_flags, separated
from sslx.console.words import shown
from sslx.errors import ConfigError, MissingInput
from sslx.machine import files

_ONE_LINE = ("partition", "account", "qos", "constraint", "reservation", "container", "mounts", "python", "interface")

RECIPE_AFTER_DASHES = (
    "put the recipe and its options after --, for example: sslx submit --nodes 2 -- simclr_cifar10 --seed 1"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Submit a pretraining run to a cluster, where it requeues itself when preempted.

    sslx submit [FLAGS] -- RECIPE [FLAGS OF sslx pretrain]
    """

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """Where to run: on Slurm, in the background of this machine (local), or in this terminal (debug)."""
    profile: str = ""
    """Settings of a cluster: a .toml path or the name of a built-in profile.  Flags override it; its setup is run."""
    nodes: int = 1
    """Number of machines."""
    gpus_per_node: int = 0
    """GPUs per machine, with one rank on each; 0 trains on CPUs."""
    ranks_per_node: int | None = None
    """Processes per machine; the default is one per GPU, or one on CPUs."""
    cpus_per_rank: int | None = None
    """CPU cores per process, data loading included; the default is the cluster's."""
    mem_gb: float | None = None
    """Memory per machine in GB; the default is the cluster's."""
    time: str = "24:00:00"
    """Time limit in Slurm's format: MINUTES, H:MM:SS or D-HH:MM:SS.  A run that reaches it is requeued."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which Slurm tells the run to save.  Slurm may be up to 60 s early."""
    give_up_s: float = 40.0
    """Seconds that a stopping run waits for a hanging rank before it falls back to its newest checkpoint."""
    partition: str = ""
    """Slurm partition; the default is the cluster's."""
    account: str = ""
    """Slurm account."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Slurm features that the nodes must have."""
    reservation: str = ""
    """Slurm reservation."""
    container: str = ""
    """Container image, passed to srun --container-image (pyxis)."""
    mounts: str = ""
    """Container mounts, passed to srun --container-mounts: SOURCE:TARGET[,...]."""
    python: str = ""
    """Command that runs Python on the nodes, without shell expansion; the default is the current Python."""
    setup: tuple[str, ...] = ()
    """Shell lines that the batch script runs before training."""
    interface: str = ""
    """Network interface for NCCL and gloo; the default is the one that reaches the other nodes."""
    sbatch: tuple[str, ...] = ()
    """Further sbatch options, such as exclusive or mail-type=END."""
    array: Path | None = None
    """Submit a sweep as one job array with a run folder per run: a .toml with [grid] lists, [[run]] tables, or both."""
    at_once: int = 256
    """Maximum number of an array's runs that run at the same time."""
    dry_run: bool = False
    """Print the batch script and submit nothing."""

    def __post_init__(self) -> None:
        for name in _ONE_LINE:
            check_one_line(f"--{name}", getattr(self, name))
        for option in self.sbatch:
            check_one_line("--sbatch", option)
            if not re.fullmatch(r"(?!wrap$)[a-z][a-z-]*", self.sbatch_name(option)):
                raise ConfigError(
                    f"--sbatch must be an sbatch option, such as exclusive or mail-type=END, not '{shown(option)}'"
                )
        for line in self.setup:
            check_one_line("--setup", line.replace("\n", " ").replace("\t", " "))
        if self.mem_gb is not None and not 0.01 <= self.mem_gb <= 1e9:
            raise ConfigError(f"--mem-gb must be between 0.01 and 1e9, not {self.mem_gb}")
        if self.python and not self.python_words:
            raise ConfigError("--python must be a command, but it contains only spaces")
        counts = {"nodes": self.nodes, "ranks-per-node": self.ranks, "cpus-per-rank": self.cpus_per_rank or 1}
        counts |= {"at-once": self.at_once, "signal-delay-s": self.signal_delay_s}
        for flag, value in counts.items():
            if value < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {value}")
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ConfigError(
                f"--ranks-per-node must be at most --gpus-per-node {self.gpus_per_node}, not {self.ranks}: each rank "
                "needs its own GPU"
            )
        if self.minutes * 60 <= self.signal_delay_s:
            raise ConfigError(
                f"--time {self.time} must be longer than --signal-delay-s {self.signal_delay_s} (seconds), because the "
                "run saves during the delay"
            )
        if not 0 < self.give_up_s < self.signal_delay_s:
            raise ConfigError(
                f"--give-up-s must be between 0 and --signal-delay-s {self.signal_delay_s}, not {self.give_up_s:g}"
            )

    @property
    def ranks(self) -> int:
        """Number of processes per machine."""
        return max(1, self.gpus_per_node) if self.ranks_per_node is None else self.ranks_per_node

    @property
    def python_words(self) -> list[str]:
        """Words of ``--python``, with ~ expanded.  Raise ConfigError for an unclosed quote."""
        try:
            return [str(files.expanded(word)) if word.startswith("~") else word for word in shlex.split(self.python)]
        except ValueError as error:
            raise ConfigError(f"--python {shown(self.python)} cannot be split into words: {error}") from error

    @staticmethod
    def sbatch_name(option: str) -> str:
        """Return the name in an sbatch option that may have leading dashes and a value."""
        return option.lstrip("-").partition("=")[0].replace("_", "-")

    @property
    def minutes(self) -> int:
        """Time limit in minutes, rounded up."""
        match = re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", self.time)
        if not match:
            raise ConfigError(f"--time must be MINUTES, H:MM:SS or D-HH:MM:SS, not '{shown(self.time)}'")
        days, *rest = match.groups()
        parts = [int(part) for part in rest if part is not None]
        if days is not None:  # D-HH[:MM[:SS]]
            seconds = 86_400 * int(days) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        else:  # MM, MM:SS or HH:MM:SS
            units = ((60,), (60, 1), (3600, 60, 1))[len(parts) - 1]
            seconds = sum(part * unit for part, unit in zip(parts, units, strict=True))
        return math.ceil(seconds / 60)


def check_one_line(name: str, value: str) -> None:
    """Raise ConfigError for a value with a line break or another control character, which a batch script cannot hold.

    name: how the error refers to the value, such as a flag.
    """
    if any(shown(character) != character and not "\ud800" <= character <= "\udfff" for character in set(value)):
        raise ConfigError(f"{name} must be one line without control characters, not '{shown(value)}'")


def load_submit(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """Split ``[FLAGS] -- RECIPE [FLAGS]`` into the job's settings and the arguments of ``sslx pretrain``."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    if "--" not in argv and any(argument in flags.recipes() for argument in argv):
        raise ConfigError(RECIPE_AFTER_DASHES)
    from_argv = separated(argv[:split])
    profile_names = [value for flag, value in pairwise(from_argv) if flag == "--profile"]
    profile: list[str] = []
    if profile_names and profile_names[-1]:
        path = profile_path(profile_names[-1])
        tree = flags.read(path)
        flags.check_known(path, tree, Config())
        profile = flags.of(tree, path)
    allocation = parse_flags(Config, [*profile, *from_argv], "sslx submit", Config(), False)
    if not argv[split + 1 :]:
        raise ConfigError(RECIPE_AFTER_DASHES)
    return allocation, list(argv[split + 1 :])


def profile_path(profile: str) -> Path:
    """Return the file of a profile, given its name or path.  Raise MissingInput if it does not exist."""
    built_in = {path.stem: path for path in (Path(__file__).parent / "profiles").glob("*.toml")}
    path = built_in.get(profile) or files.expanded(profile)
    if not os.path.exists(path):
        choices = f"choose one of {', '.join(sorted(built_in))}, or " if built_in else ""
        raise MissingInput(f"profile '{shown(profile)}' does not exist: {choices}pass the path of a .toml")
    return path
