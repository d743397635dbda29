"""Signals that ask a run to stop: they only set a flag, on which the ranks agree between two steps."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sslx.machine import environment, interrupts
from sslx.machine.interrupts import STOPPING, exit_code

GIVE_UP_S, MAX_GIVE_UP_S = 30.0, 600.0
LAST_WORDS_S = 1.0
"""Seconds for a rank's last output after a second Ctrl-C."""


class StopSignals:
    """Inside a ``with`` block, ``received`` is the number of the first stopping signal, or 0.

    A thread reads the signals, because a Python handler does not run while the main thread waits in a collective.
    ``on_stop`` is called for the first signal and ``on_query`` for each SIGUSR1, each in its own thread.  A second
    Ctrl-C ends the process immediately, after one second for ``on_end_now``; one that follows within a second counts
    as the same, sent by both terminal and launcher.  SIGHUP (a closing terminal) stays ignored if it was ignored when
    the process started (nohup).

    give_up_s: if the ranks have not agreed to stop (``acknowledge``) this many seconds after the signal, a rank hangs,
    and the process ends with the signal's exit code.  None: 30 seconds plus twice the longest step, but at most 10
    minutes.  ``on_give_up`` is called first, with these seconds.  ``leave`` ends the process with an exit code.
    """

    def __init__(self, give_up_s: float | None = None) -> None:
        self.received = 0
        self.on_stop: Callable[[], None] = lambda: None
        self.on_query: Callable[[], None] = lambda: None
        self.on_end_now: Callable[[], None] = lambda: None
        self.on_give_up: Callable[[float], None] = lambda _: None
        self.leave: Callable[[int], None] = interrupts.leave
        self._give_up_s, self._acknowledged = give_up_s, threading.Event()
        self._last_s, self._longest_s = 0.0, 0.0
        self._first_s = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGUSR1):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True, name="stop signals").start()
        return self

    def _listen(self) -> None:
        with self._read:  # only this thread closes it, since it may be between two reads when the other end is closed
            while data := self._read.recv(1):
                self._handle(data[0])

    def _handle(self, number: int) -> None:
        if number == signal.SIGUSR1:
            threading.Thread(target=self.on_query, daemon=True, name="query").start()
        if number not in STOPPING:
            return
        if not self.received:
            self.received, self._first_s = number, time.monotonic()
            for target, name in ((self.on_stop, "answer"), (self._give_up, "give up")):
                threading.Thread(target=target, daemon=True, name=name).start()
        elif number == signal.SIGINT and time.monotonic() - self._first_s > 1:
            self._call_in_time(self.on_end_now, LAST_WORDS_S)
            self.leave(130)

    def limit_s(self) -> float:
        """Return the seconds between a signal and giving up."""
        if self._give_up_s is None:
            return min(MAX_GIVE_UP_S, GIVE_UP_S + 2 * self._longest_s)
        return self._give_up_s

    def _give_up(self) -> None:
        limit_s = self.limit_s()
        # A thread cannot wait longer than TIMEOUT_MAX, which is practically forever.
        if not self._acknowledged.wait(min(limit_s, threading.TIMEOUT_MAX)):
            self._call_in_time(lambda: self.on_give_up(limit_s), 10)
            self.leave(exit_code(self.received))

    def _call_in_time(self, function: Callable[[], None], limit_s: float) -> None:
        """Call a function in a thread and wait at most ``limit_s``: it writes to a disk, which may hang, too."""
        thread = threading.Thread(target=function, daemon=True, name="last words")
        thread.start()
        thread.join(limit_s)

    def acknowledge(self, agreed: int) -> int:
        """Take note of the signal that the ranks agree on, and return it.  Call this once per step.

        A signal other than 0 means that the run is ending in good order.
        """
        now = time.monotonic()
        if self._last_s:
            self._longest_s = max(self._longest_s, now - self._last_s)
        self._last_s = now
        if agreed:
            self._acknowledged.set()
        return agreed

    def hand_over(self) -> None:
        """Leave the signals to the ranks that this process starts; it no longer gives up by itself."""
        self._acknowledged.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._acknowledged.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._write.close()


def give_up_s() -> float | None:
    """Return the seconds that ``sslx submit`` gives the ranks to agree on stopping, or None without such a limit."""
    return environment.seconds("SSLX_GIVE_UP_S", 0.0, os.environ) or None
