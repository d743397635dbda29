"""The parser of all subcommands, which makes an object of a config's class from flags.  The only importer of tyro."""

import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from typing import Any, TypeVar

import tyro
from tyro.conf import Positional as Positional
from tyro.conf import Suppress as Suppress
from tyro.conf import arg as arg

from sslx.config import flags
from sslx.console.words import shown
from sslx.errors import ConfigError, UserError

MISSING: Any = tyro.MISSING
"""Marks an option that has no default."""
T = TypeVar("T")


def separated(argv: Sequence[str]) -> list[str]:
    """Return the arguments with each ``--name=value`` split into two."""
    return [part for a in argv for part in (a.split("=", 1) if a.startswith("--") else [a])]


def print_help(kind: type[Any], prog: str, default: object) -> None:
    """Print all options of a config and exit, as --help does."""
    tyro.cli(kind, args=["--help"], prog=prog, default=default)


def parse(kind: type[T], argv: Sequence[str], prog: str) -> T:
    """Return the config of a subcommand without recipes, in which every option has a default or is required."""
    return parse_flags(kind, separated(argv), prog, None, quiet=False)


def parse_flags(kind: Any, args: list[str], prog: str, default: Any, quiet: bool) -> Any:
    """Return an object of class ``kind`` from flags, with expanded paths.

    Raises a UserError of the class's constructor, or SystemExit after printing help or tyro's message.
    """
    for text in args:
        if text.startswith("--") and len(text) > 100:  # for which the parser would look for similar names for minutes
            raise ConfigError(f"no option has a name of {len(text):,} characters: {shown(text, 60)}")
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
