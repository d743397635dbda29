"""Copies of files at addresses, in a folder of bounded size that all ranks and worker processes of a machine share.

A file is copied when it is first read: by one process, beside its place, and renamed once its size is right.  To make
room, the copies read longest ago are removed, but none that is being read.  Processes agree by locks on files, which
end with whoever holds them.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sslx.console.words import shown
from sslx.data import retries, waiting
from sslx.data.codecs.headers import Unreadable
from sslx.data.sources import remote
from sslx.data.sources.remote import Stamp
from sslx.errors import ConfigError, StorageError, UserError
from sslx.machine import files

_SUFFIX, _PART = ".shard", ".part"
_PAUSE_S = 0.05
_USED_EVERY_S = 2.0  # how exactly the time of the last use is noted


@dataclass(frozen=True)
class ShardCache:
    """The folder of copies.  max_bytes: of all copies.  timeout_s: how long a storage may refuse to be read."""

    folder: Path
    max_bytes: int
    timeout_s: float

    @contextmanager
    def opened(self, address: str, stamp: Stamp) -> Generator[int]:
        """Give a descriptor of the copy of the file that has this stamp, which is not removed meanwhile.

        Raises Unreadable if the file is gone or has changed, StorageError, and ConfigError if it exceeds ``max_bytes``.
        """
        key = hashlib.blake2b(repr((address, stamp)).encode(), digest_size=16).hexdigest()
        place = self.folder / (key + _SUFFIX)
        while True:
            try:
                descriptor = os.open(place, os.O_RDONLY)
                break
            except (FileNotFoundError, NotADirectoryError):
                self._copy(address, stamp, place)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_mtime < time.time() - _USED_EVERY_S:
                os.utime(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _copy(self, address: str, stamp: Stamp, place: Path) -> None:
        """Copy a file to its place, unless another process does so first."""
        size = stamp[0]
        if size > self.max_bytes:
            raise ConfigError(
                f"{shown(address)} has {size / 1e9:.3g} GB, more than the {self.max_bytes / 1e9:.3g} GB of "
                "--source.cache-gb: give more"
            )
        part = place.with_name(f"{place.stem}.{size}{_PART}")  # whose name says how large it will be
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(place.with_suffix(".lock"), part, address):
                if place.exists():
                    return
                try:
                    retries.until_read(
                        lambda: self._fetch(address, stamp, part), lambda: shown(address), self.timeout_s
                    )
                    part.replace(place)
                finally:
                    part.unlink(missing_ok=True)
        except (Unreadable, UserError):
            raise
        except FileNotFoundError as error:
            raise Unreadable("its file is not there any more") from error
        except Exception as error:  # the library of each storage has its own
            reason = files.reason(error)
            raise StorageError(
                f"{shown(address)} cannot be copied to {shown(self.folder)}: {reason}; check the permission and the "
                "room, or name another folder by --source.cache",
                topic="no copy of a shard",
            ) from error

    def _fetch(self, address: str, stamp: Stamp, part: Path) -> None:
        """Copy a file.  Raises the errors of its storage, ConnectionError for a copy that is cut, and Unreadable."""
        if remote.current_stamp(address) != stamp:
            raise Unreadable("its file has changed since it was indexed: start again, with the file as it was")
        self._make_room(stamp[0], part, address)
        remote.copy(address, str(part))
        if (size := part.stat().st_size) != stamp[0]:
            raise ConnectionError(f"the copy has {size:,} bytes of {stamp[0]:,}")

    def _make_room(self, size: int, part: Path, address: str) -> None:
        """Remove copies until there is room for another one of this size, and claim it by an empty ``part``."""
        wait = _Wait(self.timeout_s, f"room for {shown(address)}, since all shards there are being read", self.folder)
        while True:
            with self._locked(self.folder / "room.lock", part, address):
                part.unlink(missing_ok=True)
                copies = sorted(self.folder.glob(f"*{_SUFFIX}"), key=_last_use)
                parts = [*self.folder.glob(f"*{_PART}")]
                used = sum(map(_num_bytes, [*copies, *parts]))
                for copy in copies:
                    if used + size <= self.max_bytes:
                        break
                    used -= _removed(copy)
                if used + size <= self.max_bytes:
                    part.touch()
                    return
                for other in parts:
                    _remove_abandoned(other)
            wait.pause()

    @contextmanager
    def _locked(self, lock: Path, part: Path, address: str) -> Generator[None]:
        """Hold a lock, for which other processes wait, and so do other threads of this one."""
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        wait = _Wait(self.timeout_s, f"another process that copies {shown(address)}", self.folder, part)
        try:
            while not _is_taken(descriptor):
                wait.pause()
            yield
        finally:
            os.close(descriptor)


class _Wait:
    """A wait in short pauses, with a limit in seconds that starts again whenever the ``part`` has grown."""

    def __init__(self, limit_s: float, what: str, folder: Path, part: Path | None = None) -> None:
        self._limit_s, self._what, self._folder, self._part = limit_s, what, folder, part
        self._began_s, self._size = time.monotonic(), 0

    def pause(self) -> None:
        size = 0
        if self._part is not None:
            with suppress(FileNotFoundError):
                size = self._part.stat().st_size
        if size != self._size:
            self._size, self._began_s = size, time.monotonic()
            waiting.sign_of_life()
        if time.monotonic() > self._began_s + self._limit_s:
            raise StorageError(
                f"waited {self._limit_s:g} s (--data.timeout-s) in vain for {self._what}, in {shown(self._folder)}: "
                "give more --source.cache-gb, or name another folder by --source.cache",
                topic="no copy of a shard",
            )
        time.sleep(_PAUSE_S)


def _is_taken(descriptor: int) -> bool:
    """Take the lock of an open file, unless somebody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _num_bytes(path: Path) -> int:
    """Return the bytes that a file of the folder takes, or will take once it is whole."""
    with suppress(FileNotFoundError, ValueError):
        return int(path.stem.partition(".")[2]) if path.suffix == _PART else path.stat().st_size
    return 0


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _removed(path: Path) -> int:
    """Remove a copy, unless it is being read, and return the bytes that this frees."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _is_taken(descriptor):
                num_bytes = os.fstat(descriptor).st_size
                path.unlink()
                return num_bytes
        finally:
            os.close(descriptor)
    return 0


def _remove_abandoned(part: Path) -> None:
    """Remove what a process that was ended has left behind: nobody holds the lock of its copy."""
    with suppress(FileNotFoundError):
        descriptor = os.open(part.with_name(part.stem.partition(".")[0] + ".lock"), os.O_RDWR)
        try:
            if _is_taken(descriptor):
                part.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
