"""The sections whose options depend on a name: the method and the source of images."""

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
"""Where nobody names one."""


def method(name: str) -> MethodConfig:
    """A method's defaults, to parse its flags by: read without torch, and with all names as choices."""
    return with_choices(methods.options(name)(name=by_name.absolute(name)), methods.available())


def source(name: str) -> SourceConfig:
    """A source's defaults, to parse its flags by: read without numpy, and with all names as choices."""
    return with_choices(sources.options(name)(name=by_name.absolute(name)), sources.available())


def with_choices(options: Options, names: Sequence[str]) -> Options:
    """The options as those of a class whose name is one of ``names``, or the one that they have."""
    bare, values = type(options), vars(options)
    choices: Any = Literal[(*names, *({options.name} - {*names}))]
    kind: Any = dataclasses.make_dataclass(
        "Config", [("name", choices, field(default=options.name))], bases=(bare,), frozen=True, kw_only=True
    )
    kind.__doc__ = bare.__doc__
    return kind(**values)


def complete_method(options: MethodConfig) -> MethodConfig:
    """The method's own config in place of the one that its flags were parsed by."""
    return methods.module(options.name).Config(**vars(options))


def complete_source(options: SourceConfig) -> SourceConfig:
    """The source's own config in place of the one that its flags were parsed by."""
    return sources.config(options.name)(**vars(options))


def method_name(args: Sequence[str]) -> str:
    """The method that flags choose."""
    return by_name.absolute(flags.last(args, "method.name", METHOD))


def source_name(args: Sequence[str], default: SourceConfig | None = None) -> str:
    """The source that flags choose, in place of a default; ``folder`` for a root, where the default reads none."""
    usual = SOURCE if default is None else default.name
    if "source.root" in flags.names(args) and "root" not in _fields(usual):
        usual = "folder"
    return by_name.absolute(flags.last(args, "source.name", usual))


def with_paths(args: list[str]) -> list[str]:
    """The flags, and after them those that give the absolute paths of own files."""
    for section in ("method.name", "source.name"):
        if by_name.is_own(name := flags.last(args, section)):
            args = [*args, f"--{section}", by_name.absolute(name)]
    return args


def of_one_method(trees: Trees, args: Sequence[str]) -> Trees:
    """The trees of files without their method, and its optimizer, where flags name another one: it brings its own."""
    name = flags.last(args, "method.name")
    names = [tree["method"]["name"] for tree in trees if "name" in _table(tree, "method")]
    if not name or name == (names or [name])[-1]:
        return trees
    return [{key: value for key, value in tree.items() if key not in ("method", "optim")} for tree in trees]


def of_one_source(trees: Trees, args: Sequence[str]) -> Trees:
    """The trees of files without the sources that a later file or a flag replaces by another one."""
    chosen = flags.last(args, "source.name") or next(
        (tree["source"]["name"] for tree in reversed(trees) if "name" in _table(tree, "source")), ""
    )
    name, kept = "", Trees()
    for tree in trees:
        table = _table(tree, "source")
        name = table.get("name", name)
        others = {option.replace("-", "_") for option in table} - _fields(chosen) if chosen and not name else set()
        is_replaced = bool(chosen) and (name != chosen if name else bool(others))
        kept.append({key: value for key, value in tree.items() if key != "source"} if is_replaced else tree)
    return kept


def check_source(args: Sequence[str], name: str) -> None:
    """Raise ConfigError for flags of another source than the one that is chosen."""
    for option in sorted(flags.names(args)):
        section, _, field_name = option.partition(".")
        field_name = field_name.removeprefix("no_")
        if section != "source" or field_name in _fields(name):
            continue
        flag = f"--source.{field_name.replace('_', '-')}"
        if others := [other for other in sources.available() if field_name in _fields(other)]:
            raise ConfigError(
                f"{flag} is not an option of the source {by_name.label(name)}: it is one of {', '.join(others)}, to be "
                "chosen with --source.name"
            )


def _fields(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(sources.options(name))}


def _table(tree: dict[str, Any], section: str) -> dict[str, Any]:
    table = tree.get(section)
    return table if isinstance(table, dict) else {}
