"""Which files DALI reads itself, which ``formats`` reads for it, and which nobody can read."""

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from sslx.data.codecs import formats, headers, levels
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import Source

Indices = npt.NDArray[np.int64]
_ODD, _PLAIN, _UNKNOWN = 0, 1, 2  # what is known of a file
_SLOW_S = 0.0005  # for the header of a file: it is not in memory, or on a network


class Triage:
    """What is known of a source's files: a header is looked at once, when its file is first met."""

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source = source
        self._known = np.full(len(source), _UNKNOWN, dtype=np.uint8)
        self._workers = ThreadPoolExecutor(num_threads)  # starts none before it is used
        self._slow = False

    def plain(self, files: Indices) -> npt.NDArray[np.bool_]:
        """(B,) whether DALI reads each of these files.  Raises Unreadable at one that is no image."""
        unknown = files[self._known[files] == _UNKNOWN]
        if len(unknown):
            started = time.perf_counter()
            paths = map(self.path, unknown)
            self._known[unknown] = list((self._workers.map if self._slow else map)(headers.is_plain, paths))
            self._slow |= time.perf_counter() - started > _SLOW_S * (len(unknown) + 16)
        return self._known[files] == _PLAIN

    def path(self, i: np.int64 | int) -> str:
        assert self.source.paths is not None
        return self.source.paths[int(i)]

    def paths(self, files: Indices) -> npt.NDArray[np.uint8]:
        """(B, length) the bytes of the paths, padded with zeros, where C's strings end."""
        return np.array([os.fsencode(self.path(i)) for i in files]).view(np.uint8).reshape(len(files), -1)

    def pixels(self, files: Indices) -> list[Future[npt.NDArray[np.uint8]]]:
        """The (H, W, 3) images by ``formats``, or Unreadable, as they become ready."""
        return [self._workers.submit(self._read, i) for i in files]

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why: by ``formats``, as on the other backends.

        Where headers tell of some, only those; and no plain file is decoded where an odd one turns out to be it.
        """
        reasons: dict[int, str] = {}
        for i in index:  # again: a file may have changed since
            try:
                self._known[i] = headers.is_plain(self.path(i))
            except Unreadable as error:
                reasons[int(i)] = self._reason(i) or str(error)
        plain = self._known[index] == _PLAIN
        for some in (index[~plain], index[plain]):
            if not reasons:
                found = zip(some, self._workers.map(self._reason, some), strict=True)
                reasons = {int(i): reason for i, reason in found if reason}
        return reasons

    def set_odd(self, i: int) -> None:
        """Let ``formats`` read a file from now on."""
        self._known[i] = _ODD

    def _read(self, i: np.int64) -> npt.NDArray[np.uint8]:
        return formats.read(self.path(i), levels.of(self.source))

    def _reason(self, i: np.int64) -> str:
        """Why ``formats`` cannot read an image; empty where it can."""
        try:
            self._read(i)
        except Unreadable as error:
            return str(error)
        return ""
