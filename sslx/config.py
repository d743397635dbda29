"""The configuration of every subcommand, from recipes and flags.  The only importer of tyro.

A TOML recipe (or a saved config.json) is turned into flags and placed before the user's flags; tyro parses
once and the later flag wins.  So there is one parser, one error path and one rule of precedence.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import tyro

from sslx import methods
from sslx.checkpoint import Config as CheckpointConfig
from sslx.data import Config as DataConfig
from sslx.data.views import Augment
from sslx.encoders import Config as EncoderConfig
from sslx.errors import ConfigError, MissingInput
from sslx.log import Config as LogConfig
from sslx.methods.base import MethodConfig
from sslx.optim import Config as OptimConfig
from sslx.probe import Config as ProbesConfig
from sslx.probe.online import Config as OnlineConfig

Value: TypeAlias = "str | int | float | bool | None | list[Value] | dict[str, Value]"  # what TOML and JSON hold


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain an image encoder without labels.

    RECIPE is the name of a recipe that comes with sslx, or the path of a .toml or config.json; several are
    merged, the later one wins, and flags win over all.  Without one, the defaults below.
    """

    name: str = ""
    """Name of the run, whose files go to RUNS/NAME; default: the recipe's name, or METHOD_SOURCE."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the run's newest good checkpoint if there is one.  no: an existing run is an error."""
    seed: int = 0
    """Every random choice is a function of this, and of nothing else."""
    epochs: int = 100
    """Passes over the images."""
    steps: int | None = None
    """Optimizer steps in all; overrides epochs."""
    batch_size: int = 256
    """Images of one optimizer step, over all ranks."""
    accumulate: int = 1
    """Forward and backward passes a step, each with its share of the batch.  Saves memory, but contrastive
    methods then see only the negatives of one share: it is not the same training as one large batch."""
    ranks: int | None = None
    """Processes to start; default: one a visible GPU, or one on the CPU.  Under torchrun or Slurm: theirs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast, with losses, normalisation and statistics in fp32; auto: bf16 where the hardware has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for encoder and heads; auto: on GPUs only (a CPU compile costs minutes)."""
    batch_norm: Literal["local", "sync"] = "local"
    """Statistics of one rank or of all ranks together.  sync makes W ranks train exactly as one does."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    method: MethodConfig = field(default_factory=lambda: MethodConfig(name="simclr"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for flag, value in (("epochs", self.epochs), ("steps", self.steps), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {value}")
        if self.accumulate < 1 or (self.ranks is not None and self.ranks < 1):
            raise ConfigError("--accumulate and --ranks must be at least 1")
        if Path(self.name).name != self.name:
            raise ConfigError(f"--name {self.name!r} must be a folder name without slashes; --runs says where")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure an encoder's frozen features: kNN, linear probe and few labels, beside the untrained encoder and
    the raw pixels, all on the same held-out split."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, a checkpoint in it, or its state.pt."""
    data: DataConfig | None = None
    """Probe on another source than the run's."""
    baselines: bool = True
    """Also measure raw pixels and the untrained encoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute features."""
    batch_size: int = 256
    """Images at a time on one rank."""
    probe: ProbesConfig = field(default_factory=ProbesConfig)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw a run: the t-SNE of its features on the test split, and the loss curve.  PNG files in the run folder."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, a checkpoint in it, or its state.pt."""
    points: int = 2000
    """Images of the test split to draw."""
    seed: int = 0
    """Of t-SNE and of the choice of images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute features."""


def recipes() -> dict[str, Path]:
    """The recipes that come with sslx, by name."""
    folder = Path(str(resources.files("sslx"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _recipe(given: str) -> Path:
    path = Path(given)
    if path.suffix in (".toml", ".json"):
        if not path.is_file():
            raise MissingInput(f"recipe {path} does not exist; the ones with a name are {', '.join(recipes())}")
        return path
    if given not in recipes():
        close = difflib.get_close_matches(given, recipes(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise MissingInput(f"no recipe {given!r}: {hint}there are {', '.join(recipes())}, or give the path of a .toml")
    return recipes()[given]


def _read(path: Path) -> dict[str, Any]:
    try:
        return (json.loads if path.suffix == ".json" else tomllib.loads)(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error


def _flags(tree: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    """{"optim": {"lr": 1e-3}} -> "--optim.lr", "0.001"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}" if value else f"{prefix}no-{key}"
        elif isinstance(value, list):
            yield from [f"{prefix}{key}", *map(str, value)]
        elif value is not None:
            yield from [f"{prefix}{key}", str(value)]


def load(argv: Sequence[str], *, quiet: bool = False) -> PretrainConfig:
    """``[RECIPE ...] [--section.option VALUE ...]``; later wins.

    quiet: print nothing on an error (all ranks parse, one prints).  A wrong flag ends in SystemExit(2) after
    tyro's message with suggestions; ConfigError and MissingInput for the rest.
    """
    given: list[str] = []
    while len(given) < len(argv) and not argv[len(given)].startswith("-"):
        given.append(argv[len(given)])
    paths = [_recipe(name) for name in given]
    flags = [part for a in argv[len(given) :] for part in (a.split("=", 1) if a.startswith("--") else [a])]
    from_files = [flag for path in paths for flag in _flags(_read(path))]
    if paths and paths[-1].suffix == ".toml":
        from_files += ["--name", paths[-1].stem]
    args = from_files + flags
    chosen = ([after for before, after in pairwise(args) if before == "--method.name"] or ["simclr"])[-1]
    default = PretrainConfig(method=methods.module(chosen).Config())
    config = _parse(PretrainConfig, args, "sslx pretrain [RECIPE ...]", default, quiet)
    if not config.name:
        config = dataclasses.replace(config, name=f"{config.method.name}_{config.data.source}")
    return config


def load_probe(argv: Sequence[str]) -> ProbeConfig:
    """``CHECKPOINT [--flags]`` of ``sslx probe``."""
    return _parse(ProbeConfig, list(argv), "sslx probe", None, False)


def load_plot(argv: Sequence[str]) -> PlotConfig:
    """``CHECKPOINT [--flags]`` of ``sslx plot``."""
    return _parse(PlotConfig, list(argv), "sslx plot", None, False)


def _parse(kind: Any, args: list[str], prog: str, default: Any, quiet: bool) -> Any:
    # tyro turns errors of __post_init__ into its own words only where they are plain ValueErrors: ours are.
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, args=args, prog=prog, console_outputs=not quiet, **given)


def dump(config: Any) -> str:
    """JSON that ``load`` reads back to an equal config; stored in every checkpoint and run folder."""
    return json.dumps(dataclasses.asdict(config), default=str, indent=1) + "\n"


def loads(text: str) -> PretrainConfig:
    """The config that ``dump`` wrote."""
    tree = json.loads(text)
    default = PretrainConfig(method=methods.module(tree["method"]["name"]).Config())
    return _parse(PretrainConfig, list(_flags(tree)), "config.json", default, False)


def differences(ours: PretrainConfig, theirs: PretrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """``flag: theirs -> ours`` for every field that differs, in flag notation; ``ignore`` names prefixes."""
    a, b = (dict(_leaves(json.loads(dump(c)))) for c in (ours, theirs))
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    kept = [key for key in changed if not any(key == i or key.startswith(i + ".") for i in ignore)]
    return [f"--{key.replace('_', '-')} {b.get(key)} -> {a.get(key)}" for key in kept]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
