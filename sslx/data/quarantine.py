"""Unreadable and excluded images of a source, and the stand-ins, which are a function of the replaced sample alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data.sources import Source
from sslx.errors import DataError, StorageError

Indices = npt.NDArray[np.int64]
_NONE: Indices = np.empty(0, dtype=np.int64)
_CANDIDATES = 100
"""Images to try as one stand-in.  If none of them can be read, more than single damaged files is wrong."""


class Reader(Protocol):
    """The part of a backend that finds unreadable images."""

    def unreadable(self, index: Indices) -> dict[int, str]: ...


class Quarantine:
    """The unreadable images found so far, the excluded ones, and the stand-ins of both.

    excluded: (K,) indices of images that are never read.
    bad: the names of unreadable images by index.  substitute: maps samples to the images to read.
    known_good: (1,) a sample of the batch that was read last, or (0,) before the first batch.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        max_bad: float,
        say: Callable[[str], None],
        excluded: Indices = _NONE,
    ) -> None:
        self.source, self.reader, self.max_bad, self.say = source, reader, max_bad, say
        self.bad: dict[int, str] = {}
        self.known_good = _NONE
        self._excluded = frozenset(excluded.tolist())
        # Whether these can be read is seen when they are: the first readable one is taken, whenever that is.
        self._stand_in = {i: self._first_candidate(i) for i in sorted(self._excluded)}
        self.substitute = partial(_replace, self._stand_in)  # not a method: spawned workers must unpickle it

    def search(self, index: Indices) -> bool:
        """Find a batch's unreadable files and choose their stand-ins.  Return False if all files can be read.

        Raises what ``set_aside`` raises, and StorageError if neither the batch's files nor a previously read file can
        be read: then the storage is at fault, not the images.
        """
        files = np.unique(self.substitute(index))
        reasons = self.reader.unreadable(files)
        if len(reasons) == len(files) and len(self.known_good):
            read_before = self.substitute(self.known_good)
            if lost := self.reader.unreadable(read_before):
                ((i, reason),) = lost.items()
                raise StorageError(
                    f"none of {len(files)} images can be read, nor {self.source.where(i)}, which was read "
                    f"before ({reason}): check the disk or the mount, then start again with --resume auto",
                    topic="no image can be read",
                )
        self.set_aside(reasons)
        return bool(reasons)

    def set_aside(self, reasons: dict[int, str]) -> None:
        """Report these unreadable files with their reasons and choose their stand-ins.

        Raises DataError if more than one image and more than the fraction ``max_bad`` of all images are unreadable.
        With ``max_bad`` 0 a single one is enough.
        """
        max_num_bad = max(1, self.max_bad * len(self.source)) if self.max_bad else 0  # a small source may have one
        num_before, lines = len(self.bad), list[str]()
        for i, reason in sorted(reasons.items()):
            self.bad[i] = self.source.where(i)
            lines.append(f"{self.bad[i]} ({reason})")
        if len(self.bad) > max_num_bad:
            raise DataError(
                f"{len(self.bad)} of {len(self.source):,} images are unreadable, more than the share "
                f"{self.max_bad:g} that --data.max-bad allows; the last one is {lines[-1]}",
                topic="unreadable images",
            )
        for number, line in enumerate(lines, num_before + 1):
            self.say(f"unreadable image {line}: replaced by another image ({number} so far)")
        for i in {**self._stand_in, **self.bad}:
            if self._stand_in.get(i, i) in self.bad:
                self._stand_in[i] = self._choose(i)

    def _candidates(self, i: int) -> Iterator[int]:
        """Yield all samples in a random order that depends on i alone, computing a few at a time."""
        size = len(self.source)
        for start in range(0, size, _CANDIDATES):
            positions = np.arange(start, min(start + _CANDIDATES, size))
            yield from rng.permuted(0, "stand-in", i, size=size, positions=positions).tolist()

    def _first_candidate(self, i: int) -> int:
        return next(candidate for candidate in self._candidates(i) if candidate not in self._excluded)

    def _choose(self, i: int) -> int:
        """Return a replaced image's stand-in, the first readable image in its random order that is not excluded."""
        num_tried = 0
        for candidate in self._candidates(i):
            if candidate in self.bad or candidate in self._excluded:
                continue
            if not self.reader.unreadable(np.array([candidate])):
                return candidate
            num_tried += 1
            if num_tried == _CANDIDATES:
                raise DataError(
                    f"none of {num_tried} images tried in place of {self.source.where(i)} can be read, the last one "
                    f"being {self.source.where(candidate)}: "
                    "check the images, the disk and the mount",
                    topic="unreadable images",
                )
        raise DataError(f"none of the {len(self.source):,} images can be read: check --source.root")


def _replace(stand_in: dict[int, int], index: Indices) -> Indices:
    return np.array([stand_in.get(int(i), int(i)) for i in index], dtype=np.int64) if stand_in else index
