"""The configuration of every subcommand, from recipes and flags.  The only importer of tyro.

A TOML recipe (or a saved config.json) is turned into flags and placed before the user's flags; tyro parses
once and the later flag wins.  So there is one parser, one error path and one rule of precedence.
"""

import dataclasses
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tyro

from sslx import __version__, checkpoint, files, flags, methods
from sslx.allocation import Config as AllocationConfig
from sslx.checkpoint import Config as CheckpointConfig
from sslx.data import Config as DataConfig
from sslx.data.views import Augment
from sslx.encoders import Config as EncoderConfig
from sslx.errors import ConfigError, MissingInput, UserError
from sslx.flags import recipes as recipes
from sslx.log import Config as LogConfig
from sslx.methods.base import MethodConfig
from sslx.optim import Config as OptimConfig
from sslx.probe import Config as ProbesConfig
from sslx.probe.health import Config as HealthConfig
from sslx.probe.online import Config as OnlineConfig
from sslx.words import shown

MAX_RUNS = 2_000
"""Of one sweep: each is checked before any is submitted, a tenth of a second long."""
# A resumed run may differ in these: where and how it runs, not what it computes.
MAY_DIFFER = ("runs", "name", "resume", "ranks", "device", "compile", "data.root", "data.test_root", "data.splits",
              "data.download", "data.threads", "data.backend", "data.max_bad", "on_nonfinite", "skip_steps", "online",
              "health", "checkpoint", "log")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain an image encoder without labels.

    RECIPE is a recipe's name, or the path of a .toml or a saved config.json.

    Of several the later one wins; flags win over all.  Without one: the defaults.
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
    """Shares to cut a step's batch into, to save memory; a sample's negatives are then those of its share."""
    grad_cache_chunks: int = 1
    """Shares to cut a step's batch into, to save memory, that keep all negatives: each is embedded twice."""
    ranks: int | None = None
    """Processes to start; default: one a visible GPU, or one on the CPU.  Under torchrun or Slurm: theirs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast, with losses, normalisation, statistics in fp32; auto: bf16 on GPUs and CPUs (AMX) fast in it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for encoder and heads; auto: on GPUs (on a CPU it costs half a minute at first)."""
    batch_norm: Literal["local", "sync", "group"] = "local"
    """Statistics of one rank, or of all together, so that W ranks train as one; group: none, group norm instead."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step that is not finite is never taken.  stop: end, code 76.  skip: go on, or back where too many follow."""
    skip_steps: int = 10
    """Steps in a row that --on-nonfinite skip leaves out; at one more it goes back to the last checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    method: MethodConfig = field(default_factory=lambda: MethodConfig(name="simclr"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for flag, value in (("epochs", self.epochs), ("steps", self.steps), ("batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"--{flag} must be at least 1, not {value}")
        if min(self.accumulate, self.grad_cache_chunks, 1 if self.ranks is None else self.ranks) < 1:
            raise ConfigError("--accumulate, --grad-cache-chunks and --ranks must be at least 1")
        if self.skip_steps < 1:
            raise ConfigError(f"--skip-steps must be at least 1, not {self.skip_steps}: --on-nonfinite stop skips none")
        if self.accumulate > 1 and self.grad_cache_chunks > 1:
            raise ConfigError("--accumulate and --grad-cache-chunks both cut the batch: give one of them")
        if self.name:
            flags.check_name(self.name)

    @property
    def may_skip(self) -> int:
        """Steps in a row that may be left out because they are not finite."""
        return self.skip_steps if self.on_nonfinite == "skip" else 0

    @property
    def micro_batches(self) -> int:
        """Shares that the loader cuts a step's batch into, on each rank."""
        return self.accumulate * self.grad_cache_chunks


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure an encoder's frozen features: kNN, linear probe and few labels.

    Raw pixels and the untrained encoder stand beside it, on the same images.

    Without labels: effective rank, alignment, uniformity, instance retrieval.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, a checkpoint in it, or its state.pt."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to probe on; default: those of the run."""
    baselines: bool = True
    """Also measure raw pixels and the untrained encoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute features."""
    batch_size: int = 256
    """Images at a time on one rank."""
    probe: ProbesConfig = field(default_factory=ProbesConfig)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw a run's loss, a map of its features, neighbors and views, as PNG files."""

    checkpoint: tyro.conf.Positional[Path]
    """A run folder, a checkpoint in it, or its state.pt."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to draw; default: those of the run."""
    points: int = 2000
    """Images on the map, at most: of the test split or, where there is none, of a part of the training images."""
    seed: int = 0
    """Of the map and of the choice of images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute features."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Show that W processes, a share of the batch each, train as one with all of it."""

    methods: tyro.conf.Positional[tuple[str, ...]] = ()
    """Methods to look at; default: all."""
    ranks: tuple[int, ...] = (2, 3)
    """Numbers of processes to compare with one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there is one for each rank."""


def load(argv: Sequence[str], *, quiet: bool = False) -> PretrainConfig:
    """``[RECIPE ...] [--section.option VALUE ...]``; later wins.

    quiet: print nothing on a wrong flag (all ranks parse, one prints).  A wrong flag ends in SystemExit(2)
    after tyro's message with suggestions; ConfigError and MissingInput for the rest.
    """
    given: list[str] = []
    while len(given) < len(argv) and not argv[len(given)].startswith("-"):
        given.append(argv[len(given)])
    paths = [flags.recipe(name) for name in given]
    trees = [flags.read(path) for path in paths]
    from_argv = [part for a in argv[len(given) :] for part in (a.split("=", 1) if a.startswith("--") else [a])]
    from_files = [flag for path, tree in zip(paths, trees, strict=True) for flag in flags.of(tree, path)]
    if paths and paths[-1].suffix.lower() == ".toml":
        from_files += ["--name", paths[-1].stem]
    args = _with_folder(from_files + from_argv, DataConfig())
    chosen = ([after for before, after in pairwise(args) if before == "--method.name"] or ["simclr"])[-1]
    default = PretrainConfig(method=methods.module(chosen).Config())
    for path, tree in zip(paths, trees, strict=True):
        flags.check_known(path, tree, default)
    prog = "sslx pretrain" + " [RECIPE ...]" * ("--help" in args or "-h" in args)
    config = _parse(PretrainConfig, args, prog, default, quiet)
    if not config.name:
        config = dataclasses.replace(config, name=f"{config.method.name}_{config.data.source}")
    return config


def _with_folder(args: list[str], default: DataConfig) -> list[str]:
    """The flags, with the source ``folder`` where a root is given and neither a flag nor a recipe names a source.

    A recipe's source stays: ``simclr_cifar10 --data.root DIR`` reads CIFAR-10 there.  digits and synthetic, which a
    default may be, read no folder.
    """
    taken = default.source not in ("digits", "synthetic") or "--data.source" in args
    return args if taken or "--data.root" not in args else [*args, "--data.source", "folder"]


def load_probe(argv: Sequence[str], data: DataConfig | None = None, *, quiet: bool = False) -> ProbeConfig:
    """``CHECKPOINT [--flags]`` of ``sslx probe``; ``data``: the run's, whose fields the flags replace."""
    default = ProbeConfig(checkpoint=tyro.MISSING, data=data or DataConfig())
    from_argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--") else [a])]
    return _parse(ProbeConfig, _with_folder(from_argv, default.data), "sslx probe", default, quiet)


def load_plot(argv: Sequence[str], data: DataConfig | None = None, *, quiet: bool = False) -> PlotConfig:
    """``CHECKPOINT [--flags]`` of ``sslx plot``; ``data``: the run's, whose fields the flags replace."""
    default = PlotConfig(checkpoint=tyro.MISSING, data=data or DataConfig())
    from_argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--") else [a])]
    return _parse(PlotConfig, _with_folder(from_argv, default.data), "sslx plot", default, quiet)


def load_verify(argv: Sequence[str], *, quiet: bool = False) -> VerifyConfig:
    """``[METHOD ...] [--flags]`` of ``sslx verify``."""
    return _parse(VerifyConfig, list(argv), "sslx verify", VerifyConfig(), quiet)


def load_submit(argv: Sequence[str]) -> tuple[AllocationConfig, list[str]]:
    """``[--flags] -- RECIPE [--flags]``: the settings of the job, and the arguments of ``sslx pretrain``."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    from_argv = [part for a in argv[:split] for part in (a.split("=", 1) if a.startswith("--") else [a])]
    chosen = ([after for before, after in pairwise(from_argv) if before == "--profile"] or [""])[-1]
    profile: list[str] = []
    if chosen:
        path = flags.profile(chosen)
        tree = flags.read(path)
        flags.check_known(path, tree, AllocationConfig())
        profile = flags.of(tree, path)
    wanted = _parse(AllocationConfig, [*profile, *from_argv], "sslx submit", AllocationConfig(), False)
    if not argv[split + 1 :]:
        raise ConfigError("what to submit stands behind --, as in: sslx submit --nodes 2 -- simclr_cifar10 --seed 1")
    return wanted, list(argv[split + 1 :])


def sweep(path: Path, argv: Sequence[str]) -> list[PretrainConfig]:
    """The runs of a sweep, each named after what it changes.

    path: a .toml whose table ``grid`` has a list of values for each flag, without its dashes (all combinations are
    run), and whose tables ``run`` have one value for each.  argv: what all runs have in common.
    """
    if not os.path.exists(path):
        raise MissingInput(f"sweep {shown(path)} does not exist")
    tree = flags.read(path)
    grid, tables = tree.pop("grid", {}), tree.pop("run", [{}])
    lists = isinstance(grid, dict) and all(isinstance(values, list) and values for _, values in flags.leaves(grid))
    if tree or not lists or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(
            f"{shown(path)}: expected a table [grid] of lists that hold something, tables [[run]], nothing else"
        )
    axes = dict(flags.leaves(grid))
    num_runs = len(tables) * math.prod(map(len, axes.values()))
    if num_runs > MAX_RUNS:
        raise ConfigError(f"{shown(path)}: {num_runs:,} runs are more than the {MAX_RUNS:,} of one array: cut it")
    found: list[PretrainConfig] = []
    for table in tables:
        for values in itertools.product(*axes.values()):
            changes = dict(flags.leaves(table)) | dict(zip(axes, values, strict=True))
            run = load([*argv, *flags.of(changes, path)])
            found.append(dataclasses.replace(run, name=flags.name_of_sweep(run.name, changes)))
    if not found:
        raise ConfigError(f"{shown(path)}: no run in it")
    if len({run.name for run in found}) < len(found):
        raise ConfigError(f"{shown(path)}: two runs change the same: they would share a folder")
    return found


def _parse(kind: Any, args: list[str], prog: str, default: Any, quiet: bool) -> Any:
    """One object from flags, paths expanded.  A UserError passes; else SystemExit, after help or tyro's words."""
    for arg in args:
        if arg.startswith("--") and len(arg) > 100:  # for which the parser would look for similar names for minutes
            raise ConfigError(f"no option has a name of {len(arg):,} characters: {shown(arg, 60)}")
    for loud in (False, True):  # silent first: tyro would frame a constructor's ValueError and hide its type
        try:
            with nullcontext() if loud else redirect_stderr(io.StringIO()):
                return flags.expanded(tyro.cli(kind, args=args, prog=prog, default=default, console_outputs=loud))
        except SystemExit as stop:
            cause = stop.__context__
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__context__
            if cause is not None:
                raise cause from None
            if loud or quiet:
                raise
    raise AssertionError("tyro has exited")


def dump(config: Any) -> str:
    """JSON that ``load`` reads back to an equal config; stored in every checkpoint and run folder."""
    return json.dumps(dataclasses.asdict(config), default=str, indent=1) + "\n"


class DamagedConfig(ConfigError):
    """A saved config that no version of sslx has written."""


def loads(text: str) -> PretrainConfig:
    """The config that ``dump`` wrote.  DamagedConfig where it is none, ConfigError where it is another version's."""
    try:
        tree = files.parse_json(text)
        name = tree["method"]["name"]
    except (ValueError, LookupError, TypeError) as error:
        why = "it names no method" if isinstance(error, LookupError | TypeError) else files.reason(error)
        raise DamagedConfig(f"the saved config is damaged: {why}") from error
    try:
        default = PretrainConfig(method=methods.module(name).Config())
        return _parse(PretrainConfig, flags.of(tree, Path("config.json")), "config.json", default, True)
    except (ValueError, TypeError, AttributeError, SystemExit) as error:
        reason = str(error) if isinstance(error, UserError) else "it has other options"
        raise ConfigError(f"the saved config is not of this version of sslx ({__version__}): {reason}") from error


def differences(ours: PretrainConfig, theirs: PretrainConfig, ignore: Sequence[str] = ()) -> list[str]:
    """``flag: theirs -> ours`` for every field that differs, in flag notation; ``ignore`` names prefixes."""
    a, b = leaves(ours), leaves(theirs)
    changed = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    kept = [key for key in changed if not any(key == i or key.startswith(i + ".") for i in ignore)]
    return [f"--{key.replace('_', '-')} {b.get(key)} -> {a.get(key)}" for key in kept]


def leaves(settings: PretrainConfig) -> dict[str, Any]:
    """Every field by its dotted name, as JSON holds it."""
    return dict(flags.leaves(json.loads(dump(settings))))


def check_resumable(settings: PretrainConfig, folder: Path) -> str:
    """Raise ConfigError where the folder holds a run that these settings do not go on with.

    Returns a note where its config.json is damaged, and was compared as the newest checkpoint holds it; else "".
    """
    if not os.path.exists(folder / "config.json"):
        return ""
    if settings.resume != "auto":
        raise ConfigError(
            f"run {shown(folder)} exists: go on with --resume auto, or start another one with --name NAME"
        )
    saved, note = _saved(folder)
    changed = [shown(change) for change in differences(settings, saved, MAY_DIFFER)]
    if changed:
        raise ConfigError(
            f"run {shown(folder)} was started with another config ({'; '.join(changed[:4])}"
            f"{'; ...' if len(changed) > 4 else ''}): use the same, or another --name"
        )
    return note


def _saved(folder: Path) -> tuple[PretrainConfig, str]:
    """The config of a run, and a note where it is the checkpoint's, as config.json is damaged."""
    path = folder / "config.json"
    try:
        return loads(files.read_text(path)), ""
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError) and not isinstance(error, DamagedConfig):
            raise
        why = files.reason(error).removeprefix("the saved config is damaged: ")
    newest, _ = checkpoint.newest(folder, ("config",))
    if newest is None:
        raise ConfigError(
            f"{shown(path)} is damaged ({why}), and there is no checkpoint, which would hold the config too: take "
            "another --name, or delete the folder"
        )
    note = f"{shown(path)} is damaged ({why}): the config of {newest.name} stands in for it"
    return loads(checkpoint.load(newest, needs=("config",))["config"]), note
