"""Which files DALI reads itself, which ``formats`` reads for it, and which nobody can read."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from sslx.data.codecs import formats, headers, levels
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.sources.base import Coded

Indices = npt.NDArray[np.int64]
Image = npt.NDArray[np.uint8]
_PART = 32  # images that a thread fetches at once
_ODD, _PLAIN, _UNKNOWN = 0, 1, 2  # what is known of a file
_SLOW_S = 0.0005  # for the header of a file: it is not in memory, or on a network


class Triage:
    """What is known of a source's files: a header is looked at once, when its file is first met."""

    def __init__(self, source: Coded, num_threads: int) -> None:
        self.source = source
        self._known = np.full(len(source), _UNKNOWN, dtype=np.uint8)
        self._workers = ThreadPoolExecutor(num_threads)  # starts none before it is used
        self._slow = False

    def plain(self, files: Indices) -> npt.NDArray[np.bool_]:
        """(B,) whether DALI reads each of these files.  Raises Unreadable at one that is no image."""
        unknown = files[self._known[files] == _UNKNOWN]
        if len(unknown):
            started = time.perf_counter()
            contents = self.source.files(unknown)
            self._known[unknown] = list((self._workers.map if self._slow else map)(headers.is_plain, contents))
            self._slow |= time.perf_counter() - started > _SLOW_S * (len(unknown) + 16)
        return self._known[files] == _PLAIN

    def pixels(self, files: Indices) -> list[Future[Image]]:
        """The (H, W, 3) images by ``formats``, or Unreadable, as they become ready."""
        return [self._workers.submit(self._read, i) for i in files.tolist()]

    def fetched(self, files: Indices) -> list[Future[list[Image]]]:
        """What ``fetch`` brings of parts of a batch, or Unreadable, as they become ready."""
        parts = np.array_split(files, -(-len(files) // _PART))
        return [self._workers.submit(self.fetch, part) for part in parts]

    def fetch(self, files: Indices) -> list[Image]:
        """The bytes of the files that DALI reads, (length,) uint8, and the pixels of the others, (H, W, 3).

        Raises Unreadable.
        """
        images: list[Image] = []
        for i, file in zip(files.tolist(), self.source.files(files), strict=True):
            if self._known[i] == _UNKNOWN:
                self._known[i] = headers.is_plain(file)
            if self._known[i] == _PLAIN and isinstance(file, bytes):
                images.append(np.frombuffer(file, dtype=np.uint8))
            else:
                images.append(formats.read(file, levels.of(self.source)))
        return images

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why: by ``formats``, as on the other backends.

        Where headers tell of some, only those; and no plain file is decoded where an odd one turns out to be it.
        """
        reasons: dict[int, str] = {}
        for i in index.tolist():  # again: a file may have changed since
            try:
                self._known[i] = headers.is_plain(self._file(i))
            except Unreadable as error:
                reasons[i] = self._reason(i) or str(error)
        plain = self._known[index] == _PLAIN
        for some in (index[~plain].tolist(), index[plain].tolist()):
            if not reasons:
                words = zip(some, self._workers.map(self._reason, some), strict=True)
                reasons = {i: reason for i, reason in words if reason}
        return reasons

    def set_odd(self, i: int) -> None:
        """Let ``formats`` read a file from now on."""
        self._known[i] = _ODD

    def _file(self, i: int) -> File:
        return self.source.files(np.array([i]))[0]

    def _read(self, i: int) -> Image:
        return formats.read(self._file(i), levels.of(self.source))

    def _reason(self, i: int) -> str:
        """Why ``formats`` cannot read an image; empty where it can."""
        try:
            self._read(i)
        except Unreadable as error:
            return str(error)
        return ""
