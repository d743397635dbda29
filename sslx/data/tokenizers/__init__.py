"""Tokenizers, found by file name: each file ``sslx/data/tokenizers/<name>.py`` has ``build()``, which returns one."""

from sslx.by_name import Family
from sslx.data.tokenizers.base import Tokenizer as Tokenizer

_FAMILY = Family[object]("sslx.data.tokenizers", "the tokenizer", shared=("base",), light=())


def available() -> tuple[str, ...]:
    """Return the names of all tokenizers."""
    return _FAMILY.available()


def build(name: str) -> Tokenizer:
    """Return the tokenizer with this name, or that of the user's own file at this path.

    Raises ConfigError or MissingInput as ``by_name.Family.module`` does.
    """
    return _FAMILY.module(name).build()
