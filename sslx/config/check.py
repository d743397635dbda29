"""The configuration of ``sslx data check``: the images to look at, and where to write what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from sslx.config import choices, flags
from sslx.config.parser import arg, parse_flags, separated
from sslx.data.config import Config as DataConfig
from sslx.data.sources.config import SourceConfig


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


def load_check(argv: Sequence[str]) -> CheckConfig:
    """Return the config of ``sslx data check [FOLDER] [--flags]``."""
    args = separated(argv)
    if args and not args[0].startswith("-"):
        args = ["--source.root", *args]
    flags.check_renamed(args)
    args = choices.with_paths(args)
    name = choices.source_name(args)
    choices.check_source(args, name)
    config: CheckConfig = parse_flags(
        CheckConfig, args, "sslx data check", CheckConfig(source=choices.source(name)), quiet=False
    )
    return replace(config, source=choices.complete_source(config.source))
