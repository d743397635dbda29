"""The schema of saved configs, whose number each config has, and the migration of older schemas."""

from collections.abc import Callable
from typing import Any

from sslx.errors import ConfigError

SCHEMA = 2
"""Schema of the configs that this version saves.  Schema 1 is that of sslx 0.1, whose configs have no number."""

Tree = dict[str, Any]


def _to_2(tree: Tree) -> Tree:
    return tree  # the number came, and nothing else has changed


MIGRATIONS: dict[int, Callable[[Tree], Tree]] = {1: _to_2}
"""For each schema, a function from the whole tree to that of the next schema.  It may change the tree in place."""


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
