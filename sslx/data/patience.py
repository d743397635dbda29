"""Waiting for data: in slices, so that a stop signal is heeded, a late read is named, and no wait is without an end."""

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from sslx import distributed
from sslx.errors import StorageError

T = TypeVar("T")
SLICE_S = 0.5
WARN_S = 30.0

_calling: set[int] = set()  # threads


def is_stuck(patience_s: float) -> bool:
    """Whether a thread of this process hangs in a call that may hang, after so many seconds: it cannot be ended."""
    deadline = time.monotonic() + patience_s
    while _calling and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(_calling)


class StopWaiting(Exception):
    """The run was asked to stop while it waited for data: no batch came, and none was lost."""


def no_stop(_: float) -> bool:
    """The answer of a loader that no signal ends."""
    return False


def no_word(_: str) -> None:
    """Where what is said about waiting goes unless somebody listens."""


@dataclass
class Patience:
    """How long a loader waits for data, and whom it tells; shared by the loader and its backend.

    limit_s: without any progress, after which the wait ends.  stop: whether a wait of so many seconds is to end now
    because the run was asked to stop.  say: takes warnings.
    """

    limit_s: float = 300.0
    stop: Callable[[float], bool] = field(default=no_stop)
    say: Callable[[str], None] = field(default=no_word)

    def look(self, waited_s: float = 0.0) -> None:
        """Raise StopWaiting where the run was asked to stop."""
        if self.stop(waited_s):
            raise StopWaiting


class Watch:
    """One wait.  Time in which this process was itself stopped (Ctrl-Z) does not count: only its own slices do.

    describe: what is waited for, for a warning.
    """

    def __init__(self, patience: Patience, describe: Callable[[], str]) -> None:
        self._patience, self._describe = patience, describe
        self._total = self.waited_s = 0.0
        self._warned = False

    def progress(self) -> None:
        """Something has moved: the time starts again."""
        self.waited_s, self._warned = 0.0, False

    def slept(self, seconds: float) -> bool:
        """Count a slice; True where the limit is reached.  Raises StopWaiting."""
        self._total += seconds
        self.waited_s += seconds
        self._patience.look(self._total)
        if not self._warned and self.waited_s >= min(WARN_S, self._patience.limit_s / 2):
            self._warned = True
            self._patience.say(f"waiting for data for {self.waited_s:.0f} s: {self._describe()}")
        return self.waited_s >= self._patience.limit_s


def late(patience: Patience, what: str) -> StorageError:
    """The error of a wait that reached its limit."""
    return StorageError(
        f"rank {distributed.rank()} waited {patience.limit_s:g} s for data (--data.timeout-s) in vain: {what}: "
        "check the disk or the mount, then start again with --resume auto",
        topic="no data came",
    )


class Caller:
    """A thread that makes calls which may hang, so that the thread that wants the result can stop waiting.

    One call at a time, made while the caller waits.  A call that hangs cannot be ended: the thread and what it holds
    are left behind, and ``is_stuck`` says so.
    """

    def __init__(self, patience: Patience, describe: Callable[[], str]) -> None:
        self._patience, self._describe = patience, describe
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[tuple[Any, BaseException | None]]] = queue.SimpleQueue()
        self._is_alive = threading.Event()
        threading.Thread(target=_make, args=(self._calls, self._results), daemon=True, name="data").start()

    def __call__(self, function: Callable[[], T]) -> T:
        """The function's result or exception.  Raises StopWaiting, and StorageError at the limit."""
        self._calls.put(function)
        watch = Watch(self._patience, self._describe)
        while True:
            try:
                result, error = self._results.get(timeout=SLICE_S).pop()
            except queue.Empty:
                if self._is_alive.is_set():
                    self._is_alive.clear()
                    watch.progress()
                if watch.slept(SLICE_S):
                    raise late(self._patience, self._describe()) from None
                continue
            if error is not None:
                raise error
            return result

    def alive(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """``say`` for a function that is called: each line is a sign of life, with which the wait starts again."""

        def tell(line: str) -> None:
            self._is_alive.set()
            say(line)

        return tell

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)  # the thread ends once it has nothing to do


def _make(
    calls: "queue.SimpleQueue[Callable[[], Any] | None]",
    results: "queue.SimpleQueue[list[tuple[Any, BaseException | None]]]",
) -> None:
    while (function := calls.get()) is not None:
        _calling.add(threading.get_ident())
        box: list[tuple[Any, BaseException | None]] = []
        try:
            box.append((function(), None))
        except BaseException as error:  # whatever it is, it is the caller's
            box.append((None, error))
        _calling.discard(threading.get_ident())
        del function  # this thread keeps nothing: DALI's pipeline must not be destroyed in it
        results.put(box)
        del box


def being_read(paths: set[str]) -> str:
    """One of these files that this process has open, "" where none is: what a foreign thread may hang in."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        for path in (target, os.path.relpath(target)):
            if path in paths:
                return path
    return ""
