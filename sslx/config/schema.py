"""The schema of saved configs, whose number each config has, and the migration of older schemas."""

from collections.abc import Callable
from typing import Any

from sslx.errors import ConfigError

SCHEMA = 3
"""Schema of the configs that this version saves.

Schema 1 is that of sslx 0.1, whose configs have no number.  Before schema 3 the source was part of the data section.
"""

Tree = dict[str, Any]

RENAMED = {
    "data.source": "source.name",
    "data.root": "source.root",
    "data.test_root": "source.test_root",
    "data.splits": "source.splits",
    "data.download": "source.download",
    "data.num_synthetic": "source.num_samples",
}
"""Options that have another name now."""
_OF_SOURCE_2: dict[str, tuple[str, ...]] = {
    "folder": ("root", "test_root", "splits"),
    "digits": (),
    "synthetic": ("num_synthetic",),
}
"""What a source of schema 2 used of the options that all of them had."""
_OF_DATA_SET_2 = ("root", "download")


def _to_2(tree: Tree) -> Tree:
    return tree  # the number came, and nothing else has changed


def _to_3(tree: Tree) -> Tree:
    """Move the source to a section of its own, with those of the old options that it uses."""
    if not isinstance(tree.get("data"), dict):
        return tree
    data = dict(tree["data"])
    old = {name: data.pop(name) for _, _, name in (key.partition(".") for key in RENAMED) if name in data}
    if "source" not in old and old.get("root"):
        old["source"] = "folder"
    kept = ("source", *_OF_SOURCE_2.get(old.get("source", "digits"), _OF_DATA_SET_2))
    source = {RENAMED[f"data.{key}"].partition(".")[2]: value for key, value in old.items() if key in kept}
    return tree | {"data": data, "source": source}


MIGRATIONS: dict[int, Callable[[Tree], Tree]] = {1: _to_2, 2: _to_3}
"""For each schema, a function from the whole tree to that of the next schema."""


def migrated(tree: Tree, what: str) -> Tree:
    """Return a saved config's tree in the current schema, without the number.

    what: name of the config, for the message.  Raises ConfigError for a schema that is invalid or of a newer sslx.
    """
    tree = dict(tree)
    number = tree.pop("schema", 1)
    if type(number) is not int or number < 1:
        raise ConfigError(f"expected the schema of {what} to be a number from 1 to {SCHEMA}, got {number!r:.40}")
    if number > SCHEMA:
        raise ConfigError(
            f"{what} has schema {number}, which a newer sslx wrote (this one reads up to {SCHEMA}): update sslx"
        )
    for step in range(number, SCHEMA):
        tree = MIGRATIONS[step](tree)
    return tree
