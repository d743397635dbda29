"""Give a run folder one owner at a time: ``owner.json`` in it, on local and shared file systems.

To claim a folder, a process makes a hard link to a file that is already complete and locked (flock); of several
processes, only one can make the link.  The claim ends when the owner releases it or dies (``owner.is_alive``).  The
successor of a dead owner with token T is whoever makes the link ``.owner.T.successor``: T is never used again, so one
process wins, however late the others decide.  The winner then renames that link to ``owner.json``.
"""

import errno
import fcntl
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sslx.errors import ConfigError, StorageError
from sslx.runs import owner as owners
from sslx.runs.owner import Owner

NAME = "owner.json"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_held: set[int] = set()  # file descriptors of this process's locks


class Lock:
    """The claim of a run on its folder.  Every rank has one; rank 0's holds the lock file.

    It ends with ``release``, with the process, and, like an open file, when nothing refers to it anymore.
    """

    _release: Callable[[], object] | None = None

    def __init__(self, folder: Path, token: str, descriptor: int | None = None) -> None:
        self.folder, self.token = folder, token
        if descriptor is None:
            return
        ended, closing = threading.Event(), threading.Lock()
        threading.Thread(
            target=_send_heartbeats, args=(descriptor, ended, closing), daemon=True, name="heartbeat"
        ).start()
        # Not self: the finalizer would keep it alive forever.
        self._release = weakref.finalize(self, _release, folder, token, descriptor, os.getpid(), ended, closing)

    @property
    def is_valid(self) -> bool:
        """Whether the run folder still exists and belongs to this claim, or a disk error hides the answer."""
        owner = owners.read(self.folder / NAME)
        return owner is not None and (owner.token == self.token or not owner.pid)

    def problem(self) -> str:
        """Return what ended the claim, in one line, or "" if it is valid."""
        if self.is_valid:
            return ""
        if (owner := owners.read(self.folder / NAME)) is not None:
            change = f"now belongs to {owner}"
        elif self.folder.exists():
            change = f"was replaced, or its {NAME} was deleted,"
        else:
            change = "was deleted or moved"
        return f"run folder {self.folder} {change} during the run: nothing more is written to it"

    def check(self) -> None:
        """Raise StorageError if the claim is lost."""
        if problem := self.problem():
            raise StorageError(problem)

    def release(self) -> None:
        """Release the folder for others.  A second call has no effect."""
        if self._release:
            self._release()


def acquire(folder: Path) -> Lock:
    """Claim an existing run folder.  Raise ConfigError if a living process owns it, OSError for a disk error."""
    for _ in range(100):
        if (lock := _attempt(folder)) is not None:
            return lock
        time.sleep(0.01)
    raise ConfigError(f"many processes claim run folder {folder} at once: start one of them again")


def read_owner(folder: Path) -> tuple[Owner, bool] | None:
    """Return a run folder's owner and whether it is alive, or None without an owner.  Nothing is written."""
    chain = _chain(folder)
    return (chain[-1][1], owners.is_alive(chain[-1][1], chain[-1][0])) if chain else None


def in_use_error(folder: Path, owner: Owner, silence_s: float = 0.0) -> ConfigError:
    """Build the error for a process that tries to use a folder owned by another process."""
    silence = ""
    if silence_s > 2 * owners.HEARTBEAT_S:
        silence = (
            f"; its last sign of life was {silence_s:.0f} s ago, and it counts as gone after "
            f"{owners.GONE_AFTER_S:.0f} s without one"
        )
    return ConfigError(
        f"run folder {folder} is in use by {owner}{silence}: let it end, or stop it first, or choose another --name"
    )


def _attempt(folder: Path) -> Lock | None:
    """Claim the folder, or return None if another process was faster, so that the caller tries again."""
    token = secrets.token_hex(8)
    temp = folder / f".owner.{token}.tmp"
    descriptor = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _fill(descriptor, token)
        now = os.fstat(descriptor).st_mtime  # by the clock of the file system
        chain = _chain(folder)
        if chain and owners.is_alive(chain[-1][1], chain[-1][0], now):
            path, owner = chain[-1]
            if _chain(folder) != chain:  # released or taken over in the meantime
                os.close(descriptor)
                return None
            raise in_use_error(folder, owner, owners.silence_s(path, now))
        target = folder / (f".owner.{chain[-1][1].token}.successor" if chain else NAME)
        published = _publish(temp, target, token)
        if published is None:
            os.close(descriptor)
            return None
        if published >= 0:  # without hard links, the lock is on another file
            os.close(descriptor)
            descriptor = published
        after = _chain(folder)
        if not after or after[-1][1].token != token:  # too late: another process has taken over, and may have ended
            target.unlink()
            os.close(descriptor)
            return None
        if chain:
            target.replace(folder / NAME)
            for path, _ in chain[1:]:
                path.unlink(missing_ok=True)
        _held.add(descriptor)
        _remove_stale_claims(folder, now)
        return Lock(folder, token, descriptor)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    finally:
        temp.unlink(missing_ok=True)


def _fill(descriptor: int, token: str) -> None:
    """Lock the file and write this process into it as the owner."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flocked = True
    except OSError:
        flocked = False
    owner = owners.this_process(token, device=os.fstat(descriptor).st_dev, flocked=flocked)
    os.write(descriptor, owners.dump(owner))
    os.fsync(descriptor)


def _publish(temp: Path, target: Path, token: str) -> int | None:
    """Give the file its final name.

    Return None if that name is taken, -1 if a hard link worked, or else the descriptor of a new file with that name.
    """
    try:
        os.link(temp, target)
        return -1
    except FileExistsError:  # or NFS made the link but lost its answer
        with suppress(OSError):
            return -1 if os.path.samefile(temp, target) else None
        return None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    _fill(descriptor, token)
    return descriptor


def _chain(folder: Path) -> list[tuple[Path, Owner]]:
    """Return the owner in ``owner.json``, then successors that died before renaming their link; the last counts."""
    chain: list[tuple[Path, Owner]] = []
    path = folder / NAME
    while (next_owner := owners.read(path)) is not None and all(next_owner.token != owner.token for _, owner in chain):
        chain.append((path, next_owner))
        path = folder / f".owner.{next_owner.token}.successor"
    return chain


def _remove_stale_claims(folder: Path, now: float) -> None:
    """Remove the files of claims that were killed midway."""
    for path in folder.glob(".owner.*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > owners.GONE_AFTER_S:
                path.unlink()


def _release(
    folder: Path, token: str, descriptor: int, pid: int, ended: threading.Event, closing: threading.Lock
) -> None:
    if pid != os.getpid():  # a forked child has only a copy of the claim
        return
    with suppress(OSError):
        if (owner := owners.read(folder / NAME)) and owner.token == token:
            (folder / NAME).unlink()  # before unlocking: an unlocked file means that this process is dead
    ended.set()
    with closing:
        _held.discard(descriptor)
        os.close(descriptor)


def _send_heartbeats(descriptor: int, ended: threading.Event, closing: threading.Lock) -> None:
    while not ended.wait(owners.HEARTBEAT_S):
        with closing, suppress(OSError):
            if not ended.is_set():
                os.utime(descriptor)


def _close_inherited_locks() -> None:
    """Close the locks in a forked child, which would otherwise hold them after its parent's death."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)
