"""Tokenizer: turns a text into numbers below its size."""

from typing import Protocol


class Tokenizer(Protocol):
    """A vocabulary and how texts are written in it."""

    @property
    def num_tokens(self) -> int:
        """The number of different tokens: all are in [0, num_tokens)."""
        ...

    @property
    def pad(self) -> int:
        """The token that fills short texts up."""
        ...

    def encode(self, text: str, length: int) -> list[int]:
        """Return the tokens of a text, with its first and last token, cut to ``length``."""
        ...
