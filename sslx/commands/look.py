"""``sslx look [RECIPE ...] [flags of sslx pretrain] [-o FILE]``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sslx import config
from sslx.errors import ConfigError

HELP = """usage: sslx look [RECIPE ...] [--option VALUE ...] [-o FILE] [--num-images N]

Draw the views that the encoder would see, and what each augmentation does
alone, before any training.  The images, their views and the loader are those
of sslx pretrain with the same recipe and options (sslx pretrain --help-all).

  -o, --output FILE   PNG to write.  Default: NAME_look.png
  --num-images N      number of images on the sheet.  Default: 6
"""


def main(argv: Sequence[str]) -> int:
    """Write the sheet of views and return the exit code."""
    if "-h" in argv or "--help" in argv:
        sys.stdout.write(HELP)
        return 0
    parser = argparse.ArgumentParser("sslx look", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--num-images", type=int, default=6)
    try:
        own, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(f"sslx look: {error}") from error
    if not 1 <= own.num_images <= 24:
        raise ConfigError(f"--num-images must be from 1 to 24, not {own.num_images}")
    settings = config.load(rest)
    output: Path = own.output or Path(f"{settings.name}_look.png")
    if output.suffix not in (".png", ".svg"):
        raise ConfigError(f"--output {output} must end in .png or .svg")
    from sslx.plot import look  # imports torch, which takes seconds

    return look.main(settings, output, own.num_images)
