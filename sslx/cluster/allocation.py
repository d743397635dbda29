"""What a job asks of a cluster: nodes, GPUs, time, and all that a site wants named."""

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


BEHIND_DASHES = "put the recipe and its options after --, for example: sslx submit --nodes 2 -- simclr_cifar10 --seed 1"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Submit a pretraining run to a cluster, where it requeues itself when preempted.

    sslx submit [FLAGS] -- RECIPE [FLAGS OF sslx pretrain]
    """

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """local: in the background of this machine.  debug: here and now."""
    profile: str = ""
    """A cluster's settings: a .toml's path or a name that comes with sslx.  Its setup is run; flags win over it."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 0
    """GPUs of each machine, one rank on each; 0: train on CPUs."""
    ranks_per_node: int | None = None
    """Processes on each machine; default: one a GPU, or one."""
    cpus_per_rank: int | None = None
    """Cores of each process, which the loader shares; default: the cluster's."""
    mem_gb: float | None = None
    """Memory of each machine; default: the cluster's."""
    time: str = "24:00:00"
    """Time limit as Slurm writes it: MINUTES, H:MM:SS or D-HH:MM:SS; the run is requeued when it is over."""
    signal_delay_s: int = 120
    """How long before the limit Slurm asks the run to save; it may ask up to 60 s earlier still."""
    give_up_s: float = 40.0
    """How long a stopping run waits for a hanging rank before it goes back to its newest checkpoint."""
    partition: str = ""
    """Slurm partition; default: the cluster's."""
    account: str = ""
    """Slurm account."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Slurm features that nodes must have."""
    reservation: str = ""
    """Slurm reservation."""
    container: str = ""
    """Image for srun --container-image (pyxis)."""
    mounts: str = ""
    """For srun --container-mounts: SOURCE:TARGET[,...]."""
    python: str = ""
    """Command that runs Python on the nodes, of which a shell expands nothing; default: this Python."""
    setup: tuple[str, ...] = ()
    """Shell lines that the batch script runs first."""
    interface: str = ""
    """Network interface of NCCL and gloo; default: the one that leads to the other nodes."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch, as exclusive or mail-type=END."""
    array: Path | None = None
    """A sweep as one job array, a run folder each: a .toml with [grid] lists, [[run]] tables, or both."""
    at_once: int = 256
    """Runs of an array that may run at the same time."""
    dry_run: bool = False
    """Print the batch script and submit nothing."""

    def __post_init__(self) -> None:
        for name in _ONE_LINE:
            one_line(f"--{name}", getattr(self, name))
        for option in self.sbatch:
            one_line("--sbatch", option)
            if not re.fullmatch(r"(?!wrap$)[a-z][a-z-]*", self.sbatch_name(option)):
                raise ConfigError(
                    f"--sbatch {shown(option)} must be an option of sbatch, as exclusive or mail-type=END"
                )
        for line in self.setup:
            one_line("--setup", line.replace("\n", " ").replace("\t", " "))
        if self.mem_gb is not None and not 0.01 <= self.mem_gb <= 1e9:
            raise ConfigError(f"--mem-gb must be between 0.01 and 1e9, not {self.mem_gb}")
        if self.python and not self.python_words:
            raise ConfigError("--python must be a command, not spaces")
        counts = {"nodes": self.nodes, "ranks-per-node": self.ranks, "cpus-per-rank": self.cpus_per_rank or 1}
        counts |= {"at-once": self.at_once, "signal-delay-s": self.signal_delay_s}
        for flag, value in counts.items():
            if value < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {value}")
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise ConfigError(f"--ranks-per-node {self.ranks} needs as many GPUs, not {self.gpus_per_node}")
        if self.minutes * 60 <= self.signal_delay_s:
            raise ConfigError(
                f"--time {self.time} must be longer than --signal-delay-s {self.signal_delay_s} (seconds), in which a "
                "run saves before the limit"
            )
        if not 0 < self.give_up_s < self.signal_delay_s:
            raise ConfigError(f"--give-up-s must be between 0 and --signal-delay-s {self.signal_delay_s}")

    @property
    def ranks(self) -> int:
        """Processes on each machine."""
        return max(1, self.gpus_per_node) if self.ranks_per_node is None else self.ranks_per_node

    @property
    def python_words(self) -> list[str]:
        """The command that runs Python, in words, with ~ as the home directory.  ConfigError for an open quote."""
        try:
            return [str(files.expanded(word)) if word.startswith("~") else word for word in shlex.split(self.python)]
        except ValueError as error:
            raise ConfigError(f"--python {shown(self.python)} cannot be split into words: {error}") from error

    @staticmethod
    def sbatch_name(option: str) -> str:
        """The name of an option of sbatch, with or without dashes and a value."""
        return option.lstrip("-").partition("=")[0].replace("_", "-")

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        found = re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", self.time)
        if not found:
            raise ConfigError(f"--time must be MINUTES, H:MM:SS or D-HH:MM:SS, not '{shown(self.time)}'")
        days, *rest = found.groups()
        parts = [int(part) for part in rest if part is not None]
        if days is not None:  # D-HH[:MM[:SS]]
            seconds = 86_400 * int(days) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        else:  # MM, MM:SS or HH:MM:SS
            units = ((60,), (60, 1), (3600, 60, 1))[len(parts) - 1]
            seconds = sum(part * unit for part, unit in zip(parts, units, strict=True))
        return math.ceil(seconds / 60)


def one_line(what: str, value: str) -> None:
    """Raise ConfigError for a line break or another control character, which a batch script cannot hold."""
    if any(shown(character) != character and not "\ud800" <= character <= "\udfff" for character in set(value)):
        raise ConfigError(f"{what} must be one line without control characters, not '{shown(value)}'")


def load_submit(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """``[--flags] -- RECIPE [--flags]``: the settings of the job, and the arguments of ``sslx pretrain``."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    if "--" not in argv and any(argument in flags.recipes() for argument in argv):
        raise ConfigError(BEHIND_DASHES)
    from_argv = separated(argv[:split])
    chosen = ([after for before, after in pairwise(from_argv) if before == "--profile"] or [""])[-1]
    profile: list[str] = []
    if chosen:
        path = profile_path(chosen)
        tree = flags.read(path)
        flags.check_known(path, tree, Config())
        profile = flags.of(tree, path)
    wanted = parse_flags(Config, [*profile, *from_argv], "sslx submit", Config(), False)
    if not argv[split + 1 :]:
        raise ConfigError(BEHIND_DASHES)
    return wanted, list(argv[split + 1 :])


def profile_path(given: str) -> Path:
    """The file of a profile, given by its name or path.  MissingInput where there is none."""
    there = {path.stem: path for path in (Path(__file__).parent / "profiles").glob("*.toml")}
    path = there.get(given) or files.expanded(given)
    if not os.path.exists(path):
        known = f"there are {', '.join(sorted(there))}, or " if there else ""
        raise MissingInput(f"no profile '{shown(given)}': {known}give the path of a .toml")
    return path
