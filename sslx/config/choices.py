"""The two sections of a config whose options depend on a chosen name: the method and the source of images."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Any, Literal, TypeVar

from sslx import by_name, methods
from sslx.config import flags
from sslx.data import sources
from sslx.data.sources import SourceConfig
from sslx.errors import ConfigError
from sslx.methods.config import MethodConfig

Options = TypeVar("Options", MethodConfig, SourceConfig)
Trees = list[dict[str, Any]]
METHOD, SOURCE = "simclr", "digits"
"""The method and the source of a run whose flags name none."""


def method(name: str) -> MethodConfig:
    """Return a method's default options, for parsing its flags: read without torch, with all names as choices."""
    return with_choices(methods.options(name)(name=by_name.absolute(name)), methods.available())


def source(name: str) -> SourceConfig:
    """Return a source's default options, for parsing its flags: read without numpy, with all names as choices."""
    return with_choices(sources.options(name)(name=by_name.absolute(name)), sources.available())


def with_choices(options: Options, names: Sequence[str]) -> Options:
    """Return the options as an object of a class that allows only ``names``, and the name they have, as their name."""
    bare, values = type(options), vars(options)
    choices: Any = Literal[(*names, *({options.name} - {*names}))]
    kind: Any = dataclasses.make_dataclass(
        "Config", [("name", choices, field(default=options.name))], bases=(bare,), frozen=True, kw_only=True
    )
    kind.__doc__ = bare.__doc__
    return kind(**values)


def complete_method(options: MethodConfig) -> MethodConfig:
    """Return the method's own config in place of the object that its flags were parsed into."""
    return methods.module(options.name).Config(**vars(options))


def complete_source(options: SourceConfig) -> SourceConfig:
    """Return the source's own config in place of the object that its flags were parsed into."""
    return sources.config(options.name)(**vars(options))


def method_name(args: Sequence[str]) -> str:
    """Return the name of the method that the flags choose."""
    return by_name.absolute(flags.last(args, "method.name", METHOD))


def source_name(args: Sequence[str], default: SourceConfig | None = None) -> str:
    """Return the name of the source that the flags choose.

    Without ``--source.name``, it is that of ``default``, or ``folder`` if a root is given that it does not take.
    """
    usual = SOURCE if default is None else default.name
    if "source.root" in flags.names(args) and "root" not in _fields(usual):
        usual = "folder"
    return by_name.absolute(flags.last(args, "source.name", usual))


def with_paths(args: list[str]) -> list[str]:
    """Return the flags with absolute paths in place of relative ones that name a file as the method or the source."""
    chosen = {place + 1 for place, word in enumerate(args) if flags.names([word]) & {"method.name", "source.name"}}
    return [by_name.absolute(word) if place in chosen else word for place, word in enumerate(args)]


def of_one_method(trees: Trees, args: Sequence[str]) -> Trees:
    """Return the trees of config files for the method that the flags choose.

    If that is another method than the files', their method and optimizer are left out: the new method has its own.
    """
    name = flags.last(args, "method.name")
    names = [by_name.absolute(tree["method"]["name"]) for tree in trees if "name" in _table(tree, "method")]
    if not name or name == (names or [name])[-1]:
        return trees
    return [{key: value for key, value in tree.items() if key not in ("method", "optim")} for tree in trees]


def of_one_source(from_files: list[str], from_argv: list[str]) -> list[str]:
    """Return all flags but those of a source that a later file or flag replaces by another source.

    A flag without a source's name before it belongs to the source that is chosen, and so does an option in a file if
    the chosen source has it.
    """
    args = [*from_files, *from_argv]
    chosen = flags.last(args, "source.name")
    if not chosen:
        return args
    name, is_kept, kept = "", True, list[str]()
    for place, word in enumerate(args):
        if place == len(from_files):
            name = ""
        if word.startswith("--"):
            (option,) = flags.names([word])
            if option == "source.name":
                name = "".join(args[place + 1 : place + 2])
            is_foreign = place < len(from_files) and _field(option) not in _fields(chosen)
            is_kept = not option.startswith("source.") or (name == chosen if name else not is_foreign)
        kept += [word] if is_kept else []
    return kept


def check_source(args: Sequence[str], name: str) -> None:
    """Raise ConfigError for a flag that belongs to another source than the chosen one."""
    for option in sorted(flags.names(args)):
        if not option.startswith("source.") or _field(option) in _fields(name):
            continue
        flag = f"--source.{_field(option).replace('_', '-')}"
        if others := [other for other in sources.available() if _field(option) in _fields(other)]:
            raise ConfigError(
                f"{flag} is not an option of the source {by_name.label(name)}: it is one of {', '.join(others)}, to be "
                "chosen with --source.name"
            )


def options_of_sources() -> set[str]:
    """Return the options of all sources, as dotted names."""
    return {f"source.{option}" for name in sources.available() for option in _fields(name)}


def _field(option: str) -> str:
    return option.partition(".")[2].removeprefix("no_")


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(sources.options(name))}


def _table(tree: dict[str, Any], section: str) -> dict[str, Any]:
    table = tree.get(section)
    return table if isinstance(table, dict) else {}
