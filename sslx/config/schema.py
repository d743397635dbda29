"""The schema of saved configs: its number stands in each, and configs of older schemas are brought up to date."""

from collections.abc import Callable
from typing import Any

from sslx.errors import ConfigError

SCHEMA = 2
"""Of the configs that this sslx saves.  1, which has no number: sslx 0.1."""

Tree = dict[str, Any]


def _to_2(tree: Tree) -> Tree:
    return tree  # the number came, and nothing else has changed


MIGRATIONS: dict[int, Callable[[Tree], Tree]] = {1: _to_2}
"""From a schema to the next one: a function of the whole tree, which it may change."""


def migrated(tree: Tree, what: str) -> Tree:
    """A saved config's tree in today's schema, without the number.

    what: the config, in the message.  ConfigError where the number is not one, or is of a newer sslx.
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
