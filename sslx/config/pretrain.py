"""The configuration of the subcommands, from recipes and flags.

A TOML recipe or a saved config.json is turned into flags that are placed before the user's flags.  tyro parses them
all, and later flags win.  So there is one parser, one error path and one rule of precedence.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sslx import __version__, methods
from sslx.config import flags, presets, schema
from sslx.config.flags import recipes as recipes
from sslx.config.parser import MISSING, Positional, Suppress, parse_flags, print_help, separated
from sslx.console.words import shown
from sslx.data.augment import Augment
from sslx.data.config import Config as DataConfig
from sslx.encoders.config import Config as EncoderConfig
from sslx.encoders.recipe import Norm
from sslx.errors import ConfigError, UserError
from sslx.machine import files, gpus
from sslx.methods.config import MethodConfig
from sslx.monitor.config import HealthConfig, OnlineConfig
from sslx.optim.config import Config as OptimConfig
from sslx.probe.config import Config as ProbesConfig
from sslx.runs.config import CheckpointConfig, LogConfig


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain an image encoder without labels.

    RECIPE is a recipe's name, or the path of a .toml file or a saved config.json.

    Later recipes override earlier ones, and flags override recipes.
    """

    name: str = ""
    """Name of the run, whose files go to RUNS/NAME.  Default: the recipe's name, or METHOD_SOURCE."""
    runs: Path = Path("runs")
    """Folder that holds all runs."""
    resume: Literal["no", "auto"] = "no"
    """auto, or the folder of a run: continue from its newest good checkpoint.  no: an existing run is an error."""
    seed: int = 0
    """Random seed."""
    epochs: int = 100
    """Number of passes over all images."""
    steps: int | None = None
    """Number of optimizer steps.  Overrides --epochs."""
    batch_size: int = 256
    """Images per optimizer step, over all ranks (processes) together."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches per step.  Contrastive losses see only the negatives of one micro-batch."""
    grad_cache_chunks: int = 1
    """GradCache: chunks per step.  Saves memory and keeps all negatives, at the cost of a second forward pass."""
    ranks: int | None = None
    """Processes to start.  Default: one per visible GPU, or one on a CPU.  Under torchrun and Slurm, they decide."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """bf16: autocast, with losses and norms in fp32.  fp32: without TF32.  auto: bf16 if the device is fast at it."""
    deterministic: bool = False
    """Make restarts on GPUs equal to the last bit, at some cost in speed.  On CPUs they always are."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile encoder and heads.  auto: on GPUs only, because it delays the first step on a CPU by half a minute."""
    batch_norm: Literal["local", "sync", "group"] = "local"
    """local: over each rank's images.  sync: over all ranks' images, as on one rank.  group: group norm instead."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: stop with exit code 76, or skip the step and continue."""
    skip_steps: int = 10
    """Maximum number of consecutive steps that --on-nonfinite skip skips before it returns to the last checkpoint."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    method: MethodConfig = field(default_factory=lambda: MethodConfig(name="simclr"))
    optim: OptimConfig = field(default_factory=OptimConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    unset: Suppress[tuple[str, ...]] = field(default=(), compare=False)
    """Dotted names of options that no recipe or flag has set, until ``settle``.  ``dump`` omits these options."""

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
        """Maximum number of consecutive steps that may be skipped because they are not finite."""
        return self.skip_steps if self.on_nonfinite == "skip" else 0

    @property
    def micro_batches(self) -> int:
        """Number of parts into which the loader cuts a step's batch on each rank."""
        return self.accumulate * self.grad_cache_chunks

    @property
    def norm(self) -> Norm:
        """The value of --batch-norm as a norm of an encoder's recipe."""
        return "batch" if self.batch_norm == "local" else self.batch_norm


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure an encoder's frozen features: kNN, linear probe and few labels.

    Raw pixels and the untrained encoder are measured for comparison.

    Without labels it measures rank, alignment, uniformity and retrieval instead.
    """

    checkpoint: Positional[Path]
    """A run folder, or a checkpoint directory in it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to probe on.  Default: the run's."""
    baselines: bool = True
    """Measure raw pixels and the untrained encoder as well, for comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""
    batch_size: int = 256
    """Images per batch on each rank."""
    probe: ProbesConfig = field(default_factory=ProbesConfig)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw a run's loss, a map of its features, neighbors and views, as PNG files."""

    checkpoint: Positional[Path]
    """A run folder, or a checkpoint directory in it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images to draw.  Default: the run's."""
    points: int = 2000
    """Maximum number of images on the map, from the test split or, if there is none, from held-out training images."""
    seed: int = 0
    """Random seed of the map and of the choice of images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check that several processes, each with part of the batch, train like one.

    They must give the loss, gradients and weights of one with the whole batch.
    """

    methods: Positional[tuple[str, ...]] = ()
    """Methods to check.  Default: all."""
    ranks: tuple[int, ...] = (2, 3)
    """Numbers of processes to compare with one process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on.  auto: GPUs if there is one for each rank, else the CPU."""


def load(argv: Sequence[str], *, quiet: bool = False, gpu: bool | None = None) -> PretrainConfig:
    """Return the config of ``[RECIPE ...] [--section.option VALUE ...]``.

    Later values override earlier ones, and ``presets`` chooses values for unset options.
    quiet: do not print an error about flags, because all ranks parse and one prints.
    gpu: choose as for a GPU; by default, if this machine has one that the flags allow.
    A wrong flag raises SystemExit(2) after tyro's message with suggestions; other errors are ConfigError or
    MissingInput.
    """
    return _complete(parse(argv, quiet=quiet, gpu=gpu))


def parse(argv: Sequence[str], *, quiet: bool = False, gpu: bool | None = None) -> PretrainConfig:
    """Do what ``load`` does without importing torch: ``method`` is an object of ``methods.options``.

    ``--help-all`` prints all options and exits.
    """
    everything = "--help-all" in argv
    args, default = _read([argument for argument in argv if argument != "--help-all"], gpu)
    config = parse_flags(PretrainConfig, args, "sslx pretrain", default, quiet)
    if everything:
        print_help(PretrainConfig, "sslx pretrain [RECIPE ...]", config)
    if not config.name:
        config = dataclasses.replace(config, name=f"{config.method.name}_{config.data.source}")
    return config


def _read(argv: Sequence[str], gpu: bool | None) -> tuple[list[str], PretrainConfig]:
    """Return all flags, those of the recipes before the user's, and the defaults of unset options."""
    argv = resumed(argv)
    given = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    paths = [flags.recipe(name) for name in given]
    trees = [flags.read(path) for path in paths]
    from_argv = separated(argv[len(given) :])
    from_files = [flag for path, tree in zip(paths, trees, strict=True) for flag in flags.of(tree, path)]
    method = flags.last(from_argv, "method.name")
    if method and method != flags.last(from_files, "method.name", method):  # it brings its own
        trees = [{key: value for key, value in tree.items() if key not in ("method", "optim")} for tree in trees]
        from_files = [flag for path, tree in zip(paths, trees, strict=True) for flag in flags.of(tree, path)]
    if paths and paths[-1].suffix.lower() == ".toml":
        from_files += ["--name", paths[-1].stem]
    args = _with_folder(from_files + from_argv, DataConfig())
    method = flags.last(args, "method.name", "simclr")
    default = PretrainConfig(method=_options(method))
    for path, tree in zip(paths, trees, strict=True):
        flags.check_known(path, tree, default)
    return args, _chosen(default, args, gpu)


def resumed(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the run to resume as the recipe.

    This applies to --resume FOLDER, and to --resume auto without a recipe.  Other arguments are returned unchanged.

    Raises ConfigError if FOLDER holds no run.
    """
    argv = separated(argv)
    wanted = flags.last(argv, "resume")
    has_recipe = bool(argv) and not argv[0].startswith("-")
    if wanted in ("", "no") or wanted.startswith("-") or (wanted == "auto" and has_recipe):
        return argv
    if wanted == "auto":
        method = flags.last(argv, "method.name", "simclr")
        source = flags.last(_with_folder(argv, DataConfig()), "data.source", DataConfig().source)
        name = flags.last(argv, "name") or f"{method}_{source}"
        folder = files.expanded(flags.last(argv, "runs", "runs")) / name
        return [str(folder / "config.json"), *argv] if _is_readable(folder / "config.json") else argv
    folder = files.expanded(wanted)
    if not (folder / "config.json").is_file():
        hint = f": did you mean runs/{shown(wanted)}?" if (Path("runs") / wanted / "config.json").is_file() else ""
        raise ConfigError(f"--resume takes auto, no or the folder of a run, and {shown(folder)} holds no run{hint}")
    place = argv.index("--resume")
    rest = argv[:place] + argv[place + 2 :]
    folder = folder.absolute()
    return [str(folder / "config.json"), "--runs", str(folder.parent), "--name", folder.name, "--resume", "auto", *rest]


def _is_readable(path: Path) -> bool:
    """Return whether a run's config exists and can be read.  A damaged one is dealt with later."""
    try:
        return path.is_file() and bool(flags.read(path))
    except ConfigError:
        return False


def _chosen(default: PretrainConfig, args: list[str], gpu: bool | None = None) -> PretrainConfig:
    """Return the defaults with the values that ``presets`` chooses for the options that these flags leave unset."""
    unset = tuple(sorted(presets.names(default.method.name) - flags.names(args)))
    default = dataclasses.replace(default, unset=unset)
    encoder = flags.last(args, "encoder.name") or presets.encoder(default.method.name) or default.encoder.name
    numbers = [flags.last(args, name, "") for name in ("batch-size", "epochs")]
    batch_size, epochs = (int(text) if text.isdecimal() and int(text) else None for text in numbers)
    source = flags.last(args, "data.source", default.data.source)
    gpu = gpus.wanted(flags.last(args, "device", default.device)) if gpu is None else gpu
    usual = {} if gpu else presets.ON_CPU
    found = presets.choices(
        default.method.name,
        encoder,
        batch_size or usual.get("batch_size", default.batch_size),
        epochs or usual.get("epochs", default.epochs),
        source,
        gpu=gpu,
    )
    return presets.applied(default, presets.merged(found), unset)


def settle(config: PretrainConfig, side: int, num_images: int | None = None) -> tuple[PretrainConfig, list[str]]:
    """Return the config for ``num_images`` images and views of ``side`` pixels, and lines on the chosen values."""
    situation = config.method.name, config.encoder.name, config.batch_size, config.epochs, config.data.source
    gpu = gpus.wanted(config.device)
    found: list[presets.Choice] = []
    if not gpu and side > presets.SIDE_ON_CPU and "data.size" in config.unset:
        found, side = [presets.SMALLER_VIEWS], presets.SIDE_ON_CPU
    found += presets.choices(*situation, gpu=gpu, side=side)
    if num_images is not None and 2 <= num_images < config.batch_size and "batch_size" in config.unset:
        found.append(presets.smaller_batch(num_images))
    settled = presets.applied(dataclasses.replace(config, unset=()), presets.merged(found), config.unset)
    return settled, presets.words(found, set(config.unset))


def _options(name: str) -> MethodConfig:
    """Return a method's defaults for parsing its flags, read without torch, with all methods' names as choices."""
    bare = methods.options(name)
    choices: Any = Literal[methods.available()]
    kind: Any = dataclasses.make_dataclass(
        "Config", [("name", choices, field(default=name))], bases=(bare,), frozen=True, kw_only=True
    )
    kind.__doc__ = bare.__doc__
    return kind()


def _complete(config: PretrainConfig) -> PretrainConfig:
    """Return the config with the method's own Config class instead of the class that its flags were parsed with."""
    return dataclasses.replace(config, method=methods.module(config.method.name).Config(**vars(config.method)))


def _with_folder(args: list[str], default: DataConfig) -> list[str]:
    """Return the flags, with the source ``folder`` if they set a root but neither a flag nor a recipe sets a source.

    A recipe's source stays: ``simclr_cifar10 --data.root DIR`` reads CIFAR-10 there.  The sources digits and synthetic,
    which may be the default, do not read a folder.
    """
    taken = default.source not in ("digits", "synthetic") or "--data.source" in args
    return args if taken or "--data.root" not in args else [*args, "--data.source", "folder"]


def load_probe(argv: Sequence[str], data: DataConfig | None = None, *, quiet: bool = False) -> ProbeConfig:
    """Return the config of ``sslx probe CHECKPOINT [--flags]``.  data: the run's settings, which flags override."""
    default = ProbeConfig(checkpoint=MISSING, data=data or DataConfig())
    from_argv = separated(argv)
    return parse_flags(ProbeConfig, _with_folder(from_argv, default.data), "sslx probe", default, quiet)


def load_plot(argv: Sequence[str], data: DataConfig | None = None, *, quiet: bool = False) -> PlotConfig:
    """Return the config of ``sslx plot CHECKPOINT [--flags]``.  data: the run's settings, which flags override."""
    default = PlotConfig(checkpoint=MISSING, data=data or DataConfig())
    from_argv = separated(argv)
    return parse_flags(PlotConfig, _with_folder(from_argv, default.data), "sslx plot", default, quiet)


def load_verify(argv: Sequence[str], *, quiet: bool = False) -> VerifyConfig:
    """Return the config of ``sslx verify [METHOD ...] [--flags]``."""
    return parse_flags(VerifyConfig, list(argv), "sslx verify", VerifyConfig(), quiet)


def num_options(config: PretrainConfig) -> int:
    """Return the number of options, including those of the config's method."""
    return len(list(flags.leaves(dataclasses.asdict(config)))) - 1  # but for ``unset``


def dump(config: Any) -> str:
    """Return JSON that ``loads`` reads back to an equal config.  Settled configs are stored in run folders as such."""
    tree = dataclasses.asdict(config)
    for name in tree.pop("unset", ()):
        section, _, option = name.rpartition(".")
        (tree[section] if section else tree).pop(option)
    return json.dumps({"schema": schema.SCHEMA, **tree}, default=str, indent=1) + "\n"


class DamagedConfig(ConfigError):
    """Raised for a saved config that no version of sslx has written."""


def loads(text: str) -> PretrainConfig:
    """Return the config that ``dump`` wrote.

    Raises DamagedConfig if the text is not a config, and ConfigError if it is one of another version of sslx.
    """
    try:
        tree = files.parse_json(text)
        name = tree["method"]["name"]
    except (ValueError, LookupError, TypeError) as error:
        why = "it names no method" if isinstance(error, LookupError | TypeError) else files.reason(error)
        raise DamagedConfig(f"the saved config is damaged: {why}") from error
    tree = schema.migrated(tree, "the saved config")
    try:
        args = flags.of(tree, Path("config.json"))
        default = _chosen(PretrainConfig(method=_options(name)), args)
        return _complete(parse_flags(PretrainConfig, args, "config.json", default, True))
    except (ValueError, TypeError, AttributeError, SystemExit) as error:
        reason = str(error) if isinstance(error, UserError) else "it has other options"
        raise ConfigError(f"the saved config is not of this version of sslx ({__version__}): {reason}") from error
