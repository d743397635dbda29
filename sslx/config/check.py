"""The configuration of ``sslx data check`` and ``stats``: the images to look at, and where to write what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from sslx.config import choices, flags
from sslx.config.parser import arg, parse_flags, separated
from sslx.data.config import Config as DataConfig
from sslx.data.sources.config import SourceConfig

OfImages = TypeVar("OfImages", bound=Any)


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Look at every image of a source before a run.

    It finds images that cannot be read, copies, images that are in both splits, and odd sizes, kinds and classes.

    A folder may be given instead of --source.root: sslx data check photos
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to look at."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """A JSON file to write, with all that was found."""
    list: Path | None = None
    """A text file to write, with the paths of images to leave out: for sslx pretrain --data.exclude."""


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Count the images of a source, and measure their sizes, channels, depth, means and standard deviations.

    It ends with the flags that normalize images by these numbers.

    A folder may be given instead of --source.root: sslx data stats photos
    """

    source: SourceConfig = field(default_factory=lambda: SourceConfig(name=choices.SOURCE))
    """Images to measure."""
    data: DataConfig = field(default_factory=DataConfig)
    """How images are read."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """A JSON file to write, with the same numbers."""


def load_check(argv: Sequence[str]) -> CheckConfig:
    """Return the config of ``sslx data check [FOLDER] [--flags]``."""
    return _load(CheckConfig, "sslx data check", argv)


def load_stats(argv: Sequence[str]) -> StatsConfig:
    """Return the config of ``sslx data stats [FOLDER] [--flags]``."""
    return _load(StatsConfig, "sslx data stats", argv)


def _load(kind: type[OfImages], prog: str, argv: Sequence[str]) -> OfImages:
    args = separated(argv)
    if args and not args[0].startswith("-"):
        args = ["--source.root", *args]
    flags.check_renamed(args)
    args = choices.with_paths(args)
    name = choices.source_name(args)
    choices.check_source(args, name)
    config: OfImages = parse_flags(kind, args, prog, kind(source=choices.source(name)), quiet=False)
    return replace(config, source=choices.complete_source(config.source))
