"""Signals that ask a run to stop: they only set a flag, which the ranks agree on between two steps."""

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

GIVE_UP_S, MOST_S = 30.0, 600.0
LAST_WORDS_S = 1.0
"""For a rank's last words after a second Ctrl-C."""


class StopSignals:
    """While it is entered, ``received`` is the number of the first stopping signal that came, or 0.

    A thread reads the signals, since a Python handler does not run while the main thread sits in a collective.
    ``on_stop`` is called when the first one comes, ``on_query`` at each SIGUSR1, each by a thread of its own.  A second
    Ctrl-C ends the process at once, after a second for ``on_end_now``; one within a second is the same one, sent by
    terminal and launcher.  SIGHUP (a terminal that closes) stays ignored where it was when the process started (nohup).
    give_up_s: the process ends with the signal's exit code where the ranks have not agreed on stopping so many seconds
    after it (``heed``): a rank hangs.  None: 30 seconds and twice the longest step, 10 minutes at most.
    ``on_give_up`` is called before, with these seconds; ``leave`` ends the process with an exit code.
    """

    def __init__(self, give_up_s: float | None = None) -> None:
        self.received = 0
        self.on_stop: Callable[[], None] = lambda: None
        self.on_query: Callable[[], None] = lambda: None
        self.on_end_now: Callable[[], None] = lambda: None
        self.on_give_up: Callable[[float], None] = lambda _: None
        self.leave: Callable[[int], None] = interrupts.leave
        self._give_up_s, self._heeded = give_up_s, threading.Event()
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
        with self._read:  # closed by this thread alone, which may be between two reads when the other end is
            while data := self._read.recv(1):
                self._hear(data[0])

    def _hear(self, number: int) -> None:
        if number == signal.SIGUSR1:
            threading.Thread(target=self.on_query, daemon=True, name="query").start()
        if number not in STOPPING:
            return
        if not self.received:
            self.received, self._first_s = number, time.monotonic()
            for task, name in ((self.on_stop, "answer"), (self._give_up, "give up")):
                threading.Thread(target=task, daemon=True, name=name).start()
        elif number == signal.SIGINT and time.monotonic() - self._first_s > 1:
            self._speak(self.on_end_now, LAST_WORDS_S)
            self.leave(130)

    def limit_s(self) -> float:
        """Seconds from a signal to giving up."""
        return min(MOST_S, GIVE_UP_S + 2 * self._longest_s) if self._give_up_s is None else self._give_up_s

    def _give_up(self) -> None:
        limit_s = self.limit_s()
        # Longer than a thread can wait for is for ever.
        if not self._heeded.wait(min(limit_s, threading.TIMEOUT_MAX)):
            self._speak(lambda: self.on_give_up(limit_s), 10)
            self.leave(exit_code(self.received))

    def _speak(self, words: Callable[[], None], limit_s: float) -> None:
        """Call it in a thread for so many seconds: it writes to a disk, which may hang too."""
        speaking = threading.Thread(target=words, daemon=True, name="last words")
        speaking.start()
        speaking.join(limit_s)

    def heed(self, agreed: int) -> int:
        """The agreed signal, to be asked once a step; one that is not 0 means that the run is ending in good order."""
        now = time.monotonic()
        if self._last_s:
            self._longest_s = max(self._longest_s, now - self._last_s)
        self._last_s = now
        if agreed:
            self._heeded.set()
        return agreed

    def hand_over(self) -> None:
        """Others heed the signals from now on, the ranks that this process starts: it gives up nothing itself."""
        self._heeded.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heeded.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._write.close()


def give_up_s() -> float | None:
    """Seconds that ``sslx submit`` gives the ranks to agree on stopping; None where nothing says so."""
    return environment.seconds("SSLX_GIVE_UP_S", 0.0, os.environ) or None
