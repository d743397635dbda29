"""Waits for data, in slices, so that stop signals end them, slow reads are reported, and every wait has a limit."""

import os
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from sslx import distributed
from sslx.errors import StorageError

T = TypeVar("T")
SLICE_S = 0.5
WARN_S = 30.0

_calling: set[int] = set()  # identifiers of the threads that are in a call
_num_signs = 0  # of life, from reads that take long


def no_word(_: str) -> None:
    """Discard a message about waiting."""


_report: Callable[[str], None] = no_word
_on_sign: Callable[[], None] | None = None


def report_to(report: Callable[[str], None], on_sign: Callable[[], None] | None = None) -> None:
    """Let ``report`` take the lines of reads anywhere in this process, and ``on_sign`` note that they make progress."""
    global _report, _on_sign
    _report, _on_sign = report, on_sign


@contextmanager
def reporting_to(report: Callable[[str], None]) -> Generator[None]:
    """Let ``report`` take the lines of reads until the end of the context."""
    before = _report
    report_to(report, _on_sign)
    try:
        yield
    finally:
        report_to(before, _on_sign)


def report(line: str) -> None:
    """Say something about a read, from whichever thread or worker process makes it."""
    _report(line)


def sign_of_life() -> None:
    """Note that a read that takes long makes progress, which restarts the time of those who wait for it."""
    global _num_signs
    _num_signs += 1
    if _on_sign is not None:
        _on_sign()


def is_stuck(after_s: float) -> bool:
    """Return whether a ``Caller``'s thread, which cannot be ended, is still in a call after this many seconds."""
    deadline = time.monotonic() + after_s
    while _calling and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(_calling)


class StopWaiting(Exception):
    """The run was asked to stop while it waited for data.  No batch was lost."""


def no_stop(_: float) -> bool:
    """Return False, for loaders that no signal stops."""
    return False


@dataclass
class WaitPolicy:
    """How long a loader waits for data and where it reports waiting.  The loader shares it with its backend.

    limit_s: the time without progress after which a wait ends.  stop: takes the seconds waited and returns whether to
    end the wait because the run was asked to stop.  say: takes warnings.
    """

    limit_s: float = 300.0
    stop: Callable[[float], bool] = field(default=no_stop)
    say: Callable[[str], None] = field(default=no_word)

    def check_stop(self, waited_s: float = 0.0) -> None:
        """Raise StopWaiting if the run was asked to stop."""
        if self.stop(waited_s):
            raise StopWaiting


class Watch:
    """One wait.  Only its slices count, so that time in which this process itself was stopped (Ctrl-Z) does not.

    describe: returns what the wait is for, for a warning.
    """

    def __init__(self, wait_policy: WaitPolicy, describe: Callable[[], str]) -> None:
        self._wait_policy, self._describe = wait_policy, describe
        self._total_s = self.waited_s = 0.0
        self._has_warned = False

    def progress(self) -> None:
        """Note a sign of progress, which restarts the time."""
        self.waited_s, self._has_warned = 0.0, False

    def slept(self, seconds: float) -> bool:
        """Count a slice and return whether the limit is reached.  Raises StopWaiting."""
        self._total_s += seconds
        self.waited_s += seconds
        self._wait_policy.check_stop(self._total_s)
        if not self._has_warned and self.waited_s >= min(WARN_S, self._wait_policy.limit_s / 2):
            self._has_warned = True
            self._wait_policy.say(f"waiting for data for {self.waited_s:.0f} s: {self._describe()}")
        return self.waited_s >= self._wait_policy.limit_s


def late(wait_policy: WaitPolicy, what: str) -> StorageError:
    """Return the error of a wait that reached its limit.  what: what the wait was for."""
    return StorageError(
        f"rank {distributed.rank()} waited {wait_policy.limit_s:g} s for data (--data.timeout-s) in vain: {what}; "
        "check the disk or the mount, then start again with --resume auto",
        topic="no data came",
    )


class Caller:
    """A thread for calls that may hang, so that the thread that needs their result can stop waiting.

    It makes one call at a time, while the caller waits.  A hanging call cannot be ended: its thread and the objects in
    use there are left behind, which ``is_stuck`` reports.
    """

    def __init__(self, wait_policy: WaitPolicy, describe: Callable[[], str]) -> None:
        self._wait_policy, self._describe = wait_policy, describe
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[tuple[Any, BaseException | None]]] = queue.SimpleQueue()
        self._is_alive = threading.Event()
        threading.Thread(target=_make_calls, args=(self._calls, self._results), daemon=True, name="data").start()

    def __call__(self, function: Callable[[], T]) -> T:
        """Return the function's result or raise its exception.  Raises StopWaiting, and StorageError at the limit."""
        self._calls.put(function)
        watch, num_signs = Watch(self._wait_policy, self._describe), _num_signs
        while True:
            try:
                result, error = self._results.get(timeout=SLICE_S).pop()
            except queue.Empty:
                if self._is_alive.is_set() or num_signs != _num_signs:
                    self._is_alive.clear()
                    num_signs = _num_signs
                    watch.progress()
                if watch.slept(SLICE_S):
                    raise late(self._wait_policy, self._describe()) from None
                continue
            if error is not None:
                raise error
            return result

    def alive(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """Wrap ``say`` for use inside a call: each line is a sign of progress, which restarts the wait."""

        def say_and_restart(line: str) -> None:
            self._is_alive.set()
            say(line)

        return say_and_restart

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)  # ends the thread after its current call


def _make_calls(
    calls: "queue.SimpleQueue[Callable[[], Any] | None]",
    results: "queue.SimpleQueue[list[tuple[Any, BaseException | None]]]",
) -> None:
    while (function := calls.get()) is not None:
        _calling.add(threading.get_ident())
        box: list[tuple[Any, BaseException | None]] = []
        try:
            box.append((function(), None))
        except BaseException as error:  # raised again in the calling thread
            box.append((None, error))
        _calling.discard(threading.get_ident())
        del function  # DALI's pipeline must not be destroyed in this thread, so keep no reference to it
        results.put(box)
        del box


def being_read(paths: set[str]) -> str:
    """Return one of these files that this process has open, in whose read a thread may hang; "" if none is open."""
    for link in Path("/proc/self/fd").glob("*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        for path in (target, os.path.relpath(target)):
            if path in paths:
                return path
    return ""
