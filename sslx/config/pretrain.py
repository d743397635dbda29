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
from typing import Annotated, Any, Literal, TypeVar

from sslx import __version__, by_name
from sslx.config import choices, flags, presets, schema
from sslx.config.flags import recipes as recipes
from sslx.config.parser import MISSING, Positional, Suppress, arg, parse_flags, print_help, separated
from sslx.console.words import shown
from sslx.data import sources
from sslx.data.augment import Augment
from sslx.data.config import Config as DataConfig
from sslx.data.sources.config import SourceConfig
from sslx.encoders.config import Config as EncoderConfig
from sslx.encoders.recipe import Norm
from sslx.errors import ConfigError, UserError
from sslx.machine import files, gpus
from sslx.methods.config import AverageConfig, MethodConfig
from sslx.monitor.config import HealthConfig, OnlineConfig
from sslx.optim.config import Config as OptimConfig
from sslx.probe.config import Config as ProbesConfig
from sslx.runs.config import CheckpointConfig, LogConfig, ResultsConfig


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
    num_micro_batches: int = 1
    """Gradient accumulation: micro-batches per step.  Contrastive losses see only the negatives of one micro-batch."""
    num_grad_cache_chunks: int = 1
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
    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augment = field(default_factory=Augment)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    method: MethodConfig = field(default_factory=lambda: MethodConfig(name=choices.METHOD))
    average: AverageConfig = field(default_factory=AverageConfig)
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
        if min(self.num_micro_batches, self.num_grad_cache_chunks, 1 if self.ranks is None else self.ranks) < 1:
            raise ConfigError("--num-micro-batches, --num-grad-cache-chunks and --ranks must be at least 1")
        if self.skip_steps < 1:
            raise ConfigError(f"--skip-steps must be at least 1, not {self.skip_steps}: --on-nonfinite stop skips none")
        if self.num_micro_batches > 1 and self.num_grad_cache_chunks > 1:
            raise ConfigError("--num-micro-batches and --num-grad-cache-chunks both cut the batch: give one of them")
        if self.name:
            flags.check_name(self.name)

    @property
    def may_skip(self) -> int:
        """Maximum number of consecutive steps that may be skipped because they are not finite."""
        return self.skip_steps if self.on_nonfinite == "skip" else 0

    @property
    def batches_per_step(self) -> int:
        """Number of parts into which the loader cuts a step's batch on each rank."""
        return self.num_micro_batches * self.num_grad_cache_chunks

    @property
    def norm(self) -> Norm:
        """The value of --batch-norm as a norm of an encoder's recipe."""
        return "batch" if self.batch_norm == "local" else self.batch_norm


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(ResultsConfig):
    """Measure frozen features: kNN, linear, few labels, and scores without labels.

    Raw pixels and the untrained encoder are measured for comparison.
    """

    checkpoints: Positional[tuple[Path, ...]]
    """Run folders, checkpoint directories in them, or weights of other libraries; several are compared."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder for scores and features of weights that sslx did not train.  Default: they are only printed."""
    part: str | None = None
    """Place of the encoder in a file of another library that holds several, such as teacher."""
    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to probe on.  Default: the first run's."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read.  Default: as in the run."""
    baselines: bool = True
    """Measure raw pixels and the untrained encoder as well, for comparison."""
    transfer: tuple[str, ...] = ()
    """Further labeled images to score the same encoder on: folders, names of sources, or NAME=FOLDER."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute features on."""
    batch_size: int = 256
    """Images per batch on each rank."""
    probe: ProbesConfig = field(default_factory=ProbesConfig)

    def __post_init__(self) -> None:
        if self.checkpoints == ():
            raise ConfigError("expected the PATH of a run, got none: sslx probe runs/NAME")


OfImages = TypeVar("OfImages", bound=Any)


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
    """Do what ``load`` does without importing torch: method and source are objects of ``choices``.

    ``--help-all`` prints all options and exits.
    """
    everything = "--help-all" in argv
    args, default = _read([argument for argument in argv if argument != "--help-all"], gpu)
    config = parse_flags(PretrainConfig, args, "sslx pretrain", default, quiet)
    if everything:
        print_help(PretrainConfig, "sslx pretrain [RECIPE ...]", config)
    if not config.name:
        config = dataclasses.replace(config, name=_usual_name(config.method.name, config.source.name))
    return config


def _usual_name(method: str, source: str) -> str:
    return f"{by_name.label(method)}_{by_name.label(source)}"


def _read(argv: Sequence[str], gpu: bool | None) -> tuple[list[str], PretrainConfig]:
    """Return all flags, those of the recipes before the user's, and the defaults of unset options."""
    argv = resumed(argv)
    recipes = list(itertools.takewhile(lambda argument: not argument.startswith("-"), argv))
    paths = [flags.recipe(name) for name in recipes]
    from_argv = choices.with_paths(separated(argv[len(recipes) :]))
    flags.check_renamed(from_argv)
    trees = choices.of_one_method([flags.read(path) for path in paths], from_argv)
    from_files = [flag for path, tree in zip(paths, trees, strict=True) for flag in flags.of(tree, path)]
    if paths and paths[-1].suffix.lower() == ".toml":
        from_files += ["--name", paths[-1].stem]
    args = choices.of_one_source(choices.with_paths(from_files), from_argv)
    default = PretrainConfig(
        method=choices.method(choices.method_name(args)),
        source=choices.source(choices.source_name(args)),
    )
    for path, tree in zip(paths, trees, strict=True):
        flags.check_known(path, tree, default, choices.options_of_sources())
    choices.check_source(args, default.source.name)
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
        name = flags.last(argv, "name") or _usual_name(choices.method_name(argv), choices.source_name(argv))
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
    unset = tuple(sorted(presets.names(default.method.name, default.source) - flags.names(args)))
    default = dataclasses.replace(default, unset=unset)
    encoder = flags.last(args, "encoder.name") or presets.encoder(default.method.name) or default.encoder.name
    numbers = [flags.last(args, name, "") for name in ("batch-size", "epochs")]
    batch_size, epochs = (int(text) if text.isdecimal() and int(text) else None for text in numbers)
    gpu = gpus.is_requested(flags.last(args, "device", default.device)) if gpu is None else gpu
    usual = {} if gpu else presets.ON_CPU
    found = presets.choices(
        default.method.name,
        encoder,
        batch_size or usual.get("batch_size", default.batch_size),
        epochs or usual.get("epochs", default.epochs),
        default.source,
        gpu=gpu,
    )
    return presets.applied(default, presets.merged(found), unset)


def settle(config: PretrainConfig, side: int, num_images: int | None = None) -> tuple[PretrainConfig, list[str]]:
    """Return the config for ``num_images`` images and views of ``side`` pixels, and lines on the chosen values."""
    situation = config.method.name, config.encoder.name, config.batch_size, config.epochs, config.source
    gpu = gpus.is_requested(config.device)
    found: list[presets.Choice] = []
    if not gpu and side > presets.SIDE_ON_CPU and "data.size" in config.unset:
        found, side = [presets.SMALLER_VIEWS], presets.SIDE_ON_CPU
    found += presets.choices(*situation, gpu=gpu, side=side)
    plain = config.encoder.name == "resnet18" and config.encoder.weights is None
    chosen = {"encoder.name", *presets.SMALLER_ENCODER.values} - {*config.unset}
    if not gpu and side <= presets.SMALL_SIDE and plain and not chosen:
        found.append(presets.SMALLER_ENCODER)
    if num_images is not None and 2 <= num_images < config.batch_size and "batch_size" in config.unset:
        found.append(presets.smaller_batch(num_images))
    settled = presets.applied(dataclasses.replace(config, unset=()), presets.merged(found), config.unset)
    return settled, presets.words(found, set(config.unset))


def _complete(config: PretrainConfig) -> PretrainConfig:
    """Return the config with its method's and source's own classes instead of those that flags were parsed with."""
    method, source = choices.complete_method(config.method), choices.complete_source(config.source)
    return dataclasses.replace(config, method=method, source=source)


def load_probe(argv: Sequence[str], run: PretrainConfig | None = None, *, quiet: bool = False) -> ProbeConfig:
    """Return the config of ``sslx probe CHECKPOINT... [--flags]``.

    run: the run's config, whose source and data the flags override.
    """
    return of_images(ProbeConfig, "sslx probe", argv, run, quiet)


def of_images(
    kind: type[OfImages], prog: str, argv: Sequence[str], run: PretrainConfig | None, quiet: bool
) -> OfImages:
    """Return the config of a command whose class ``kind`` has a checkpoint, a source and data; ``run`` as above."""
    data, source, args = _images(argv, run)
    missing = {"checkpoints" if kind is ProbeConfig else "checkpoint": MISSING}
    config: OfImages = parse_flags(kind, args, prog, kind(**missing, data=data, source=source), quiet)
    return dataclasses.replace(config, source=choices.complete_source(config.source))


def _images(argv: Sequence[str], run: PretrainConfig | None) -> tuple[DataConfig, SourceConfig, list[str]]:
    """Return the settings for reading images, the source to parse the flags with, and all flags."""
    args = separated(argv)
    flags.check_renamed(args)
    args = choices.with_paths(args)
    default = run.source if run else choices.source(_saved_source(args))
    name = choices.source_name(args, default)
    choices.check_source(args, name)
    if run and default.name == name:
        return run.data, choices.with_choices(default, sources.available()), args
    return run.data if run else DataConfig(), choices.source(name), args


def _saved_source(args: Sequence[str]) -> str:
    """Return the name of the source of the run among the arguments, before its checkpoint is read, else folder."""
    for word in args:
        for folder in (Path(word), *Path(word).parents[:2]):  # a run, its checkpoints, one of them
            is_run = not word.startswith("--") and (folder / "checkpoints").is_dir()
            if is_run and _is_readable(folder / "config.json"):
                return flags.read(folder / "config.json").get("source", {}).get("name", choices.SOURCE)
    return "folder"


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
        _ = tree["method"]["name"]
    except (ValueError, LookupError, TypeError) as error:
        why = "it names no method" if isinstance(error, LookupError | TypeError) else files.reason(error)
        raise DamagedConfig(f"the saved config is damaged: {why}") from error
    tree = schema.migrated(tree, "the saved config")
    try:
        args = flags.of(tree, Path("config.json"))
        method, source = choices.method(choices.method_name(args)), choices.source(choices.source_name(args))
        default = _chosen(PretrainConfig(method=method, source=source), args)
        return _complete(parse_flags(PretrainConfig, args, "config.json", default, True))
    except (ValueError, TypeError, AttributeError, SystemExit) as error:
        reason = str(error) if isinstance(error, UserError) else "it has other options"
        raise ConfigError(f"the saved config is not of this version of sslx ({__version__}): {reason}") from error
