"""The schema of saved configs, whose number each config has, and the migration of older schemas."""

from collections.abc import Callable
from typing import Any

from sslx.errors import ConfigError

SCHEMA = 4
"""The schema of the configs that this sslx saves.

1, which has no number, is that of sslx 0.1.  Before 3 the source was part of the data.  Before 4 the names of counts
did not begin with ``num_``, and ``online.every`` was in epochs.
"""

Tree = dict[str, Any]

_SOURCE_3 = {
    "data.source": "source.name",
    "data.root": "source.root",
    "data.test_root": "source.test_root",
    "data.splits": "source.splits",
    "data.download": "source.download",
    "data.num_synthetic": "source.num_samples",
}
_COUNTS_4 = {
    "accumulate": "num_micro_batches",
    "grad_cache_chunks": "num_grad_cache_chunks",
    "online.bank": "online.num_references",
    "online.queries": "online.num_queries",
    "health.samples": "health.num_samples",
}
RENAMED = _SOURCE_3 | _COUNTS_4 | {"probe.draws": "probe.num_draws", "points": "num_points"}
"""Options that have another name now."""
_OF_SOURCE_2: dict[str, tuple[str, ...]] = {
    "folder": ("root", "test_root", "splits"),
    "digits": (),
    "synthetic": ("num_synthetic",),
}
"""The options that a source of schema 2 used of those that all sources had."""
_OF_DATA_SET_2 = ("root", "download")


def _to_2(tree: Tree) -> Tree:
    return tree  # the number came, and nothing else has changed


def _to_3(tree: Tree) -> Tree:
    """Move the source to a section of its own, with those of the old options that it uses."""
    if not isinstance(tree.get("data"), dict):
        return tree
    data = dict(tree["data"])
    old = {name: data.pop(name) for _, _, name in (key.partition(".") for key in _SOURCE_3) if name in data}
    if "source" not in old and old.get("root"):
        old["source"] = "folder"
    kept = ("source", *_OF_SOURCE_2.get(old.get("source", "digits"), _OF_DATA_SET_2))
    source = {RENAMED[f"data.{key}"].partition(".")[2]: value for key, value in old.items() if key in kept}
    return tree | {"data": data, "source": source}


def _to_4(tree: Tree) -> Tree:
    """Counts are named so, and a time in epochs gives way to the default in steps."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for old, new in _COUNTS_4.items():
        (section, _, old_name), (_, _, new_name) = old.rpartition("."), new.rpartition(".")
        table = tree.get(section) if section else tree
        if isinstance(table, dict) and old_name in table:
            table[new_name] = table.pop(old_name)
    if isinstance(online := tree.get("online"), dict) and online.get("every"):
        del online["every"]
    return tree


MIGRATIONS: dict[int, Callable[[Tree], Tree]] = {1: _to_2, 2: _to_3, 3: _to_4}
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
