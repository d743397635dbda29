"""Unreadable images of a source, and the readable ones that stand in for them: functions of the sample alone."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data.sources import Source
from sslx.errors import DataError, StorageError

Indices = npt.NDArray[np.int64]
_CANDIDATES = 100
"""Images that are tried as another one's stand-in: if none can be read, it is not for single files that are damaged."""


class Reader(Protocol):
    """The part of a backend that tells which images it cannot read."""

    def unreadable(self, index: Indices) -> dict[int, str]: ...


class Quarantine:
    """``bad``: index -> name of the images found unreadable so far.  ``substitute``: what is read in their place.

    known_good: (1,) an image of the batch that was read last, or (0,).
    """

    def __init__(self, source: Source, reader: Reader, max_bad: float, say: Callable[[str], None]) -> None:
        self.source, self.reader, self.max_bad, self.say = source, reader, max_bad, say
        self.bad: dict[int, str] = {}
        self.known_good: Indices = np.empty(0, dtype=np.int64)
        self._stand_in: dict[int, int] = {}
        self.substitute = partial(_replace, self._stand_in)  # not a method: spawned workers must unpickle it

    def search(self, index: Indices) -> bool:
        """Find the unreadable files of a batch and name their stand-ins; False where all can be read.

        Raises as ``set_aside``, and StorageError where not one of them can be read, nor what was read before: then it
        is not the images that are damaged.
        """
        files = np.unique(self.substitute(index))
        reasons = self.reader.unreadable(files)
        if len(reasons) == len(files) and len(self.known_good):
            before = self.substitute(self.known_good)
            if lost := self.reader.unreadable(before):
                ((i, reason),) = lost.items()
                raise StorageError(
                    f"not one of {len(files)} images can be read, nor {self.source.where(i)}, which was read "
                    f"before ({reason}): check the disk or the mount, then start again with --resume auto",
                    topic="no image can be read",
                )
        self.set_aside(reasons)
        return bool(reasons)

    def set_aside(self, reasons: dict[int, str]) -> None:
        """Name these unreadable files, each with its reason, and choose their stand-ins.

        Raises DataError where they are more than the share ``max_bad``, and more than one.
        """
        most = max(1, self.max_bad * len(self.source)) if self.max_bad else 0  # one of a few images ends no run
        before, lines = len(self.bad), list[str]()
        for i, reason in sorted(reasons.items()):
            self.bad[i] = self.source.where(i)
            lines.append(f"{self.bad[i]} ({reason})")
        if len(self.bad) > most:
            raise DataError(
                f"{len(self.bad)} of {len(self.source):,} images are unreadable, more than the share "
                f"{self.max_bad:g} that --data.max-bad allows; the last one is {lines[-1]}",
                topic="unreadable images",
            )
        for number, line in enumerate(lines, before + 1):
            self.say(f"unreadable image {line}: replaced by another one ({number} so far)")
        for i in self.bad:
            if self._stand_in.get(i, i) in self.bad:
                self._stand_in[i] = self._choose(i)

    def _candidates(self, i: int) -> Iterator[int]:
        """All samples in a random order that is a function of i alone, a few of them computed at a time."""
        size = len(self.source)
        for start in range(0, size, _CANDIDATES):
            positions = np.arange(start, min(start + _CANDIDATES, size))
            yield from rng.permuted(0, "stand-in", i, size=size, positions=positions).tolist()

    def _choose(self, i: int) -> int:
        """The stand-in of an unreadable image: the first readable one of a random order of its own."""
        tried = 0
        for candidate in self._candidates(i):
            if candidate in self.bad:
                continue
            if not self.reader.unreadable(np.array([candidate])):
                return candidate
            tried += 1
            if tried == _CANDIDATES:
                raise DataError(
                    f"not one of {tried} images that were tried in the place of {self.bad[i]} can be read, the "
                    f"last of them {self.source.where(candidate)}: "
                    "check the images, the disk and the mount",
                    topic="unreadable images",
                )
        raise DataError(f"not one of the {len(self.source):,} images can be read")


def _replace(stand_in: dict[int, int], index: Indices) -> Indices:
    return np.array([stand_in.get(int(i), int(i)) for i in index], dtype=np.int64) if stand_in else index
