"""Texts: one of each sample's captions is drawn, turned into tokens, and delivered as ``Batch.text``."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data import tokenizers
from sslx.errors import ConfigError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """The text that a method needs of each sample.

    tokenizer: the name of a file in ``sslx/data/tokenizers``, or the path of a user's own.  length: the number of
    tokens: longer texts are cut, shorter ones padded.
    """

    tokenizer: str = "utf8"
    length: int = 64


class Texts:
    """The tokens of captions.  Which caption of a sample is taken is a function of the seed, the epoch and the sample.

    captions: of each sample, one or more.  name: the source's, for messages.  Raises ConfigError if there are none.
    """

    def __init__(self, spec: TextSpec, captions: Sequence[Sequence[str]] | None, name: str, seed: int) -> None:
        if captions is None:
            raise ConfigError(
                f"the method trains on images with texts, and those of {name} have none: use a source with captions"
            )
        self._captions, self._seed, self._length = captions, seed, spec.length
        self._tokenizer = tokenizers.build(spec.tokenizer)

    def tokens(self, epoch: int | Indices, index: Indices, files: Indices) -> npt.NDArray[np.int64]:
        """Return the tokens of a batch, (B, length).

        epoch: the epoch, or the pass of each sample (B,).  index: the samples (B,), by which captions are drawn.
        files: the samples (B,) whose captions they get, which differ where an image is unreadable and another one takes
        its place.
        """
        tokens = np.full((len(index), self._length), self._tokenizer.pad, dtype=np.int64)
        numbers = rng.uniform(self._seed, "caption", epoch, index, num=1)[:, 0]
        for row, number, file in zip(tokens, numbers.tolist(), files.tolist(), strict=True):
            captions = self._captions[int(file)]
            content = self._tokenizer.encode(captions[int(number * len(captions))], self._length)
            row[: len(content)] = content
        return tokens
