"""Reads that a storage refuses for the moment are tried again after growing pauses, so that no other image is taken."""

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sslx.console.words import one_line, shown
from sslx.data import waiting
from sslx.errors import StorageError

T = TypeVar("T")
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.1, 10.0
_SHARE = 0.9
"""Part of the time limit that retries may take, so that their error comes before that of whoever waits for them."""
_SAY_EVERY_S = 30.0
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EBUSY", "EINTR", "ESTALE", "ETIMEDOUT", "EPIPE", "EPROTO", "ENOBUFS", "ENOTCONN", "EREMOTEIO",
        "ECOMM", "ENOLINK", "ESHUTDOWN", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH",
        "ENETDOWN", "ENETRESET", "ENETUNREACH",
    )
    if hasattr(errno, name)
}  # fmt: skip
"""Errors of a disk, a mount or a network.  Others are about the file: it is not there, no file, or not permitted."""
_LIBRARIES = {"aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "aiobotocore", "urllib", "urllib3", "requests",
              "http", "httpx", "azure", "google"}  # fmt: skip
"""Libraries of storages, whose errors need not be OSErrors."""
_BUSY = (408, 425, 429)
"""Codes of HTTP with which a server asks to come again, as it does with those from 500 on."""
_lock = threading.Lock()
_named: set[str] = set()
_last_said_s = -_SAY_EVERY_S


def may_pass(error: BaseException) -> bool:
    """Return whether the same read may succeed later: the storage is at fault, not the file that was asked for."""
    status = _status(error)
    if isinstance(status, int) and 400 <= status < 600:
        return status >= 500 or status in _BUSY
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's word for any error of a server
        return may_pass(error.__cause__)
    if isinstance(error, ValueError | FileNotFoundError | PermissionError):
        return False
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


def is_of_storage(error: BaseException) -> bool:
    """Return whether what makes an image unreadable may pass, because it is an error of its disk or mount."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _PASSING


def _status(error: BaseException) -> object:
    """Return the code of HTTP that an error has, under the names that libraries give it."""
    for owner, name in ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code")):
        if (status := getattr(owner, name, None)) is not None:
            return status
    return None


def until_read(
    read: Callable[[], T], place: Callable[[], str], timeout_s: float, passes: Callable[[Exception], bool] = may_pass
) -> T:
    """Return ``read()``, tried again as long as it raises what may pass.

    place: returns what is read, for messages.  Raises other errors as they are, and StorageError once the time is over.
    """
    began_s, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while True:
        try:
            return read()
        except Exception as error:
            if not passes(error):
                raise
            waited_s = time.monotonic() - began_s
            reason = one_line(error) or type(error).__name__
            if waited_s + pause_s > _SHARE * timeout_s:
                raise StorageError(
                    f"{place()} could not be read for {waited_s:.0f} s ({reason}; --data.timeout-s {timeout_s:g}): "
                    "check the disk, the mount or the network, then start again with --resume auto; --data.exclude "
                    "leaves out images that are lost for good",
                    topic="no data came",
                ) from error
            _say(place(), reason)
        time.sleep(pause_s * (1 + os.getpid() % 8 / 16))  # not all ranks at once
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _say(place: str, reason: str) -> None:
    """Name a place once, and not more than one place in half a minute: a server that fails does so for many."""
    global _last_said_s
    with _lock:
        now_s = time.monotonic()
        if place in _named or now_s < _last_said_s + _SAY_EVERY_S:
            return
        _named.add(place)
        _last_said_s = now_s
    waiting.report(f"{place} cannot be read for now ({shown(reason)}): tries again until it can")
