"""One owner of a run folder at a time: ``owner.json`` in it, on local and shared file systems.

A claim is a hard link, which only one of several can make, to a file that is complete and locked (flock) before it gets
its name.  It ends when the owner releases it, or with the owner's death (``owner.lives``).  The successor of a dead
owner T is who makes the link ``.owner.T.successor``: the token T is never used again, so one process wins, however late
the others decide.  It then renames that link to ``owner.json``.
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
_held: set[int] = set()  # descriptors of this process's locks


class Lock:
    """The claim of one process on a run folder, as all ranks of the run know it; rank 0 holds it.

    Released by ``release``, by the end of the process, and, like a file, when nothing refers to it any more.
    """

    _release: Callable[[], object] | None = None

    def __init__(self, folder: Path, token: str, descriptor: int | None = None) -> None:
        self.folder, self.token = folder, token
        if descriptor is None:
            return
        ended, closing = threading.Event(), threading.Lock()
        threading.Thread(target=_beat, args=(descriptor, ended, closing), daemon=True, name="heartbeat").start()
        # Not self, which would then live for ever.
        self._release = weakref.finalize(self, _release, folder, token, descriptor, os.getpid(), ended, closing)

    @property
    def is_valid(self) -> bool:
        """Whether the run folder is still there and still this claim's, or a disk in trouble does not say."""
        found = owners.read(self.folder / NAME)
        return found is not None and (found.token == self.token or not found.pid)

    def lost(self) -> str:
        """What has become of the claim, in one line, "" where it stands."""
        if self.is_valid:
            return ""
        if (found := owners.read(self.folder / NAME)) is not None:
            became = f"now belongs to {found}"
        elif self.folder.exists():
            became = f"was replaced, or its {NAME} was deleted,"
        else:
            became = "was deleted or moved"
        return f"run folder {self.folder} {became} while the run was going on: nothing more is written to it"

    def check(self) -> None:
        """Raise StorageError where the claim is lost."""
        if line := self.lost():
            raise StorageError(line)

    def release(self) -> None:
        """Let others have the folder.  Twice does no harm."""
        if self._release:
            self._release()


def acquire(folder: Path) -> Lock:
    """Claim a run folder that is there.  ConfigError where a living process owns it, OSError from the file system."""
    for _ in range(100):
        if (lock := _attempt(folder)) is not None:
            return lock
        time.sleep(0.01)
    raise ConfigError(f"run folder {folder} is claimed by many processes at once: start one of them again")


def read_owner(folder: Path) -> tuple[Owner, bool] | None:
    """Return a run folder's owner and whether it is alive, or None without an owner.  Nothing is written."""
    chain = _chain(folder)
    return (chain[-1][1], owners.lives(chain[-1][1], chain[-1][0])) if chain else None


def refuse(folder: Path, owner: Owner, silence_s: float = 0.0) -> ConfigError:
    """The error for who wants a folder that another process owns."""
    sign = f"; its last sign of life was {silence_s:.0f} s ago" if silence_s > 2 * owners.HEARTBEAT_S else ""
    gone = f" and it counts as gone after {owners.GONE_AFTER_S:.0f} s without one" if sign else ""
    return ConfigError(
        f"run folder {folder} is in use by {owner}{sign}{gone}: let it end, or stop it first, or take another --name"
    )


def _attempt(folder: Path) -> Lock | None:
    """Claim the folder, None where another process was faster: look again."""
    token = secrets.token_hex(8)
    temp = folder / f".owner.{token}.tmp"
    descriptor = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _fill(descriptor, token)
        now = os.fstat(descriptor).st_mtime  # by the clock of the file system
        chain = _chain(folder)
        if chain and owners.lives(chain[-1][1], chain[-1][0], now):
            path, owner = chain[-1]
            if _chain(folder) != chain:  # released or taken over meanwhile
                os.close(descriptor)
                return None
            raise refuse(folder, owner, owners.silence_s(path, now))
        target = folder / (f".owner.{chain[-1][1].token}.successor" if chain else NAME)
        replaced = _publish(temp, target, token)
        if replaced is None:
            os.close(descriptor)
            return None
        if replaced >= 0:  # a file system without links: the lock is another file's
            os.close(descriptor)
            descriptor = replaced
        after = _chain(folder)
        if not after or after[-1][1].token != token:  # late: somebody has taken over and perhaps ended since
            target.unlink()
            os.close(descriptor)
            return None
        if chain:
            target.replace(folder / NAME)
            for path, _ in chain[1:]:
                path.unlink(missing_ok=True)
        _held.add(descriptor)
        _sweep(folder, now)
        return Lock(folder, token, descriptor)
    except BaseException:
        with suppress(OSError):
            os.close(descriptor)
        raise
    finally:
        temp.unlink(missing_ok=True)


def _fill(descriptor: int, token: str) -> None:
    """Lock the file and write this process into it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flocked = True
    except OSError:
        flocked = False
    me = owners.this_process(token, device=os.fstat(descriptor).st_dev, flocked=flocked)
    os.write(descriptor, owners.dump(me))
    os.fsync(descriptor)


def _publish(temp: Path, target: Path, token: str) -> int | None:
    """Give the file its name if that is free: None if not, -1 by a link, else the descriptor of a file of its own."""
    try:
        os.link(temp, target)
        return -1
    except FileExistsError:  # or NFS has made the link and lost its answer
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
    """The owner that ``owner.json`` names, then successors that died before they could rename; the last counts."""
    chain: list[tuple[Path, Owner]] = []
    path = folder / NAME
    while (found := owners.read(path)) is not None and all(found.token != owner.token for _, owner in chain):
        chain.append((path, found))
        path = folder / f".owner.{found.token}.successor"
    return chain


def _sweep(folder: Path, now: float) -> None:
    """Remove what claims that were killed midway have left behind."""
    for path in folder.glob(".owner.*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > owners.GONE_AFTER_S:
                path.unlink()


def _release(
    folder: Path, token: str, descriptor: int, pid: int, ended: threading.Event, closing: threading.Lock
) -> None:
    if pid != os.getpid():  # a forked child's copy is not the claim
        return
    with suppress(OSError):
        if (found := owners.read(folder / NAME)) and found.token == token:
            (folder / NAME).unlink()  # while it is locked: who sees it unlocked takes this process for dead
    ended.set()
    with closing:
        _held.discard(descriptor)
        os.close(descriptor)


def _beat(descriptor: int, ended: threading.Event, closing: threading.Lock) -> None:
    while not ended.wait(owners.HEARTBEAT_S):
        with closing, suppress(OSError):
            if not ended.is_set():
                os.utime(descriptor)


def _forget() -> None:
    """In a forked child, which would hold the lock after its parent's death."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
