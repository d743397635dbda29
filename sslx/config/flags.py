"""Turns settings in files (recipes, saved configs, profiles, sweeps) into flags, and interprets paths and names."""

import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from sslx.config import schema
from sslx.console.words import shown
from sslx.errors import ConfigError, MissingInput
from sslx.machine import files

MAX_BYTES, MAX_VALUES, MAX_TEXT = 1 << 18, 20_000, 10_000
"""Limits of a settings file: its bytes, the number of its values, and the characters of a value."""
MAX_STRANGE = 10
"""Maximum number of unknown keys in a file for which the parser makes suggestions."""
MAX_NAME_BYTES = 200
"""Maximum length of a run's name.  File systems allow 255 bytes, and some files are named after the run."""
_PATHS = ("weights",)
"""Fields that hold a path as a string, because they may hold other things as well."""


_FOLDER = Path(str(resources.files("sslx"))) / "recipes"


def recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with sslx, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def recipe(given: str) -> Path:
    """Return the file of a recipe that is given by name or path.

    Raises MissingInput if there is none, and ConfigError for another kind of file.
    """
    path = files.expanded(given)
    if path.suffix.lower() in (".toml", ".json"):
        if not os.path.exists(path):
            raise MissingInput(f"recipe {shown(path)} does not exist; sslx recipes lists those that have a name")
        return path
    if given in recipes():
        return recipes()[given]
    if os.path.isfile(path / "config.json"):  # a run: its config
        return path / "config.json"
    if os.path.isdir(path):
        raise ConfigError(
            f"{shown(path)} is a folder and no run: to train on the images in it, sslx pretrain --source.root "
            f"{shown(path)}"
        )
    if os.path.exists(path):
        what = "YAML" if path.suffix.lower() in (".yaml", ".yml") else f"'{shown(path.suffix)}'"
        raise ConfigError(f"recipe {shown(path)} must be a .toml or a saved config.json, not {what}")
    close = difflib.get_close_matches(given[:100], recipes(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise MissingInput(
        f"no recipe '{shown(given)}': {hint}sslx recipes lists them all; a .toml file or a run folder is one too"
    )


def read(path: Path) -> dict[str, Any]:
    """Return the tables of a .json file, or of a TOML file with any other name, merged with those of its bases.

    A recipe that is built on others starts with ``base = "digits"`` or a list of names.  They are files in
    recipes/bases, other recipes, or .toml files beside the recipe.  Raises ConfigError for a file that cannot be read
    or is too large.
    """
    tree = _tree(path)
    if _is_json(path):
        return schema.migrated(tree, shown(path))
    return _with_bases(tree, path, (path,))


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _tree(path: Path) -> dict[str, Any]:
    try:
        text = files.read_text(path, MAX_BYTES)
        tree = files.parse_json(text) if _is_json(path) else files.parse_toml(text)
        if (size := _size(tree)) > MAX_VALUES:
            raise ValueError(f"it has {size:,} values, and settings are no more than {MAX_VALUES:,}")
    except (OSError, ValueError) as error:
        kind = "JSON" if _is_json(path) else "TOML"
        raise ConfigError(f"{shown(path)} cannot be read as {kind}: {files.reason(error)}") from error
    return tree


def _with_bases(tree: dict[str, Any], path: Path, heirs: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe merged with its bases.  Values of the recipe override its bases, and later bases earlier ones.

    heirs: the recipes that lead to this one.  Raises ConfigError for a base that is missing or that leads to itself.
    """
    names: Any = tree.pop("base", [])
    merged: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        base = _base(str(name), path)
        if base in heirs:
            raise ConfigError(f"{shown(path)} has the base {shown(name)}, which is built on it: remove one of the two")
        merged = _merged(merged, _with_bases(_tree(base), base, (*heirs, base)))
    return _merged(merged, tree)


def _base(name: str, path: Path) -> Path:
    """Return the file of a base, which stands beside the recipe or comes with sslx."""
    places = (path.parent / name, _FOLDER / "bases" / f"{name}.toml", _FOLDER / f"{name}.toml")
    for place in places:
        if place.suffix == ".toml" and place.is_file():
            return place
    known = ", ".join(base.stem for base in sorted((_FOLDER / "bases").glob("*.toml")))
    raise ConfigError(
        f"{shown(path)} has the base '{shown(name)}', which is not there: take {known}, a recipe's name or a .toml file"
    )


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of both, with the values of ``tree`` where both have one."""
    both = dict(base)
    for key, value in tree.items():
        inherited = both.get(key)
        both[key] = _merged(inherited, value) if isinstance(inherited, dict) and isinstance(value, dict) else value
    return both


def _size(tree: Any) -> int:
    """Return the number of tables, lists and values at any depth."""
    inside: Iterable[Any] = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return 1 + sum(map(_size, inside))


def of(tree: dict[str, Any], path: Path) -> list[str]:
    """Turn {"optim": {"lr": 1e-3}} into ["--optim.lr", "0.001"].

    path: of the file, for the message.  Raises ConfigError for keys and values that cannot be flags.
    """
    try:
        return list(_flags(tree))
    except ValueError as error:
        raise ConfigError(f"{shown(path)} is no file of settings: {error}") from error


def _flags(tree: dict[str, Any], prefix: str = "--") -> Iterator[str]:
    for key, value in sorted(tree.items(), key=lambda item: item[0] != "name"):  # whose the other options are
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", key):
            raise ValueError(f"'{shown(key, 60)}' is no name of an option")
        if isinstance(value, dict):
            yield from _flags(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}" if value else f"{prefix}no-{key}"
        else:
            yield f"{prefix}{key}"
            for part in value if isinstance(value, list) else [value]:
                yield _argument(key, part)


def _argument(key: str, value: Any) -> str:
    if isinstance(value, list | dict):
        raise ValueError(f"{key} holds a list or table in a list")
    text = files.as_argument(str(value))
    if len(text) > MAX_TEXT:
        raise ValueError(f"the value of {key} has more than {MAX_TEXT:,} characters")
    if isinstance(value, str) and re.match(r"-(?!\.?[0-9])", text):
        raise ValueError(f"{key} = '{shown(text, 60)}' begins with a dash, as a flag does")
    return text


def names(args: Sequence[str]) -> set[str]:
    """Return the dotted names of the options that flags set, such as optim.weight_decay for --optim.weight-decay 0."""
    return {_name(arg) for arg in args if arg.startswith("--")}


def _name(flag: str) -> str:
    section, _, option = flag.removeprefix("--").replace("-", "_").rpartition(".")
    return f"{section}.{option}" if section else option


def check_renamed(args: Sequence[str]) -> None:
    """Raise ConfigError for a flag that has another name now."""
    for name in sorted(names(args)):
        section, _, option = name.rpartition(".")
        option = option.removeprefix("no_")
        if new := schema.RENAMED.get(f"{section}.{option}" if section else option):
            raise ConfigError(f"--{name.replace('_', '-')} is now --{new.replace('_', '-')}")


def last(args: Sequence[str], name: str, default: str = "") -> str:
    """Return the value of the last flag with this name."""
    wanted = _name(name)
    values = [after for flag, after in pairwise(args) if flag.startswith("--") and _name(flag) == wanted]
    return values[-1] if values else default


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables with their dotted names: ("optim.lr", 1e-3) for {"optim": {"lr": 1e-3}}."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_known(path: Path, tree: dict[str, Any], default: Any, others: Collection[str] = ()) -> None:
    """Raise ConfigError, with suggestions, for a file with keys that are not fields of ``default``.

    others: dotted names of options that are also known.
    """
    known = {name for name, _ in leaves(dataclasses.asdict(default))}.union(others)
    strange = [name for name, _ in leaves(tree) if name.replace("-", "_") not in known]
    if len(strange) > MAX_STRANGE:
        some = ", ".join(shown(name, 60) for name in strange[:3])
        raise ConfigError(
            f"{shown(path)} is no file of settings: {len(strange):,} of its keys are no options ({some}, ...)"
        )
    if strange:
        each = [f"{shown(name, 60)}{_meant(name.replace('-', '_'), known)}" for name in strange]
        raise ConfigError(
            f"{shown(path)} sets what is no option: {', '.join(each)}; sslx pretrain --help-all lists all"
        )


def _meant(name: str, known: set[str]) -> str:
    """Return a hint at the new name of an option or at a similarly named one, or an empty string."""
    if name in schema.RENAMED:
        return f" (it is now {schema.RENAMED[name]})"
    close = [f"{name}.name"] if f"{name}.name" in known else difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def expanded(settings: Any) -> Any:
    """Return the settings with ``~`` expanded to the home directory in all paths, at any depth."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value: Any = getattr(settings, field.name)
        new = value
        if dataclasses.is_dataclass(value):
            new = expanded(value)
        elif isinstance(value, Path):
            new = files.expanded(value)
        elif isinstance(value, tuple):
            new = tuple(
                files.expanded(part) if isinstance(part, Path) else part for part in cast("Sequence[Any]", value)
            )
        elif field.name in _PATHS and isinstance(value, str) and value.startswith("~"):
            new = str(files.expanded(value))
        if new != value:
            changes[field.name] = new
    return dataclasses.replace(settings, **changes) if changes else settings


def check_name(name: str) -> None:
    """Raise ConfigError for a run's name that is unsuitable as a folder's name."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > MAX_NAME_BYTES:
        raise ConfigError(f"--name '{shown(name, 60)}' has {size:,} bytes: take {MAX_NAME_BYTES} at most")
    if any(shown(character) != character and not "\ud800" <= character <= "\udfff" for character in name):
        raise ConfigError(f"--name '{shown(name)}' must be one line without control characters")
    if Path(name).name != name:
        raise ConfigError(f"--name '{shown(name)}' must be a folder name without slashes; --runs says where")
    if name.startswith((".", "-")) or name != name.strip():
        raise ConfigError(f"--name '{shown(name)}' must not begin with a dot or a dash, nor begin or end with a space")


def name_of_sweep(name: str, changes: dict[str, Any]) -> str:
    """Return the name of a sweep's run, made of its changes, with a digest if a folder cannot have that name."""
    exact = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    short = re.sub(r"[^\w.,=+-]+", "_", exact)
    room = MAX_NAME_BYTES - len(os.fsencode(name)) - 10
    if short != exact or len(short.encode()) > room:
        digest = hashlib.sha256(exact.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        short = f"{short.encode()[: max(0, room)].decode(errors='ignore')}-{digest}"
    return f"{name}-{short}" if short else name
