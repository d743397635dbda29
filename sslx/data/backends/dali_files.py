"""Decide which files DALI reads itself, which ``formats`` reads for it, and which are unreadable."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sslx.data import retries
from sslx.data.codecs import formats, headers, levels
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.sources.base import Coded

Indices = npt.NDArray[np.int64]
Image = npt.NDArray[np.uint8]
T = TypeVar("T")
_PART = 32  # number of images that a thread fetches at once
_ODD, _PLAIN, _UNKNOWN = 0, 1, 2  # states of a file
_SLOW_S = 0.0005  # time for a file's header above which the file is not cached, or on a network


class DaliFiles:
    """The states of a source's files.  Each header is read once, at the file's first use."""

    def __init__(self, source: Coded, num_threads: int) -> None:
        self.source = source
        self._states = np.full(len(source), _UNKNOWN, dtype=np.uint8)
        self._workers = ThreadPoolExecutor(num_threads)  # starts threads at its first use
        self._is_slow = False

    def plain(self, files: Indices) -> npt.NDArray[np.bool_]:
        """Return whether DALI reads each of these files: (B,).  Raises Unreadable for a file that is not an image."""
        unknown = files[self._states[files] == _UNKNOWN]
        if len(unknown):
            started = time.perf_counter()
            contents = self.source.files(unknown)
            pairs = zip(unknown.tolist(), contents, strict=True)
            self._states[unknown] = list((self._workers.map if self._is_slow else map)(self._is_plain, pairs))
            self._is_slow |= time.perf_counter() - started > _SLOW_S * (len(unknown) + 16)
        return self._states[files] == _PLAIN

    def pixels(self, files: Indices) -> list[Future[Image]]:
        """Return futures of the (H, W, 3) images read by ``formats``, which may raise Unreadable."""
        return [self._workers.submit(self._read, i) for i in files.tolist()]

    def fetched(self, files: Indices) -> list[Future[list[Image]]]:
        """Return futures of ``fetch`` for parts of a batch, which may raise Unreadable."""
        parts = np.array_split(files, -(-len(files) // _PART))
        return [self._workers.submit(self.fetch, part) for part in parts]

    def fetch(self, files: Indices) -> list[Image]:
        """Return the bytes of the files that DALI reads, (length,) uint8, and the pixels of others, (H, W, 3) uint8.

        Raises Unreadable.
        """
        images: list[Image] = []
        for i, file in zip(files.tolist(), self.source.files(files), strict=True):
            if self._states[i] == _UNKNOWN:
                self._states[i] = headers.is_plain(file)
            if self._states[i] == _PLAIN and isinstance(file, bytes):
                images.append(np.frombuffer(file, dtype=np.uint8))
            else:
                images.append(formats.read(file, levels.of(self.source)))
        return images

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Return the images that ``formats`` cannot read, as on the other backends, and the reasons.

        The search stops at the first group with unreadable images: headers first, then odd files, then plain files.
        """
        reasons: dict[int, str] = {}
        for i in index.tolist():  # read headers again, because files may have changed
            try:
                self._states[i] = self._is_plain((i, self._file(i)))
            except Unreadable as error:
                reasons[i] = self._reason(i) or str(error)
        plain = self._states[index] == _PLAIN
        for group in (index[~plain].tolist(), index[plain].tolist()):
            if not reasons:
                results = zip(group, self._workers.map(self._reason, group), strict=True)
                reasons = {i: reason for i, reason in results if reason}
        return reasons

    def set_odd(self, i: int) -> None:
        """Let ``formats`` read a file from now on."""
        self._states[i] = _ODD

    def _file(self, i: int) -> File:
        return self.source.files(np.array([i]))[0]

    def _is_plain(self, numbered: tuple[int, File]) -> bool:
        i, file = numbered
        return self._until_read(i, partial(headers.is_plain, file))

    def _read(self, i: int) -> Image:
        return self._until_read(i, partial(formats.read, self._file(i), levels.of(self.source)))

    def _until_read(self, i: int, read: Callable[[], T]) -> T:
        source = self.source
        return retries.until_read(read, partial(source.where, i), source.timeout_s, retries.is_of_storage)

    def _reason(self, i: int) -> str:
        """Return why ``formats`` cannot read an image, or "" if it can."""
        try:
            self._read(i)
        except Unreadable as error:
            return str(error)
        return ""
