"""Signals that ask a run to stop: they only set a flag, which the ranks agree on between two steps."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # Ctrl-C, Slurm's preemption, submitit's


class StopSignals:
    """While it is entered, ``received`` is the number of the first stopping signal that came, or 0.

    A thread reads the signals, since a Python handler does not run while the main thread sits in a collective.
    A second Ctrl-C ends the process at once; one within a second is the same one, sent by terminal and launcher.
    give_up_s: the process ends with exit code 75 where the ranks have not agreed on stopping so many seconds after
    the signal (``heed``): a rank hangs, and Slurm will not wait.  ``on_give_up`` is called before.
    """

    def __init__(self, give_up_s: float = math.inf) -> None:
        self.received = 0
        self.on_give_up: Callable[[], None] = lambda: None
        self._give_up_s, self._heeded = give_up_s, threading.Event()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            self._previous[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, daemon=True, name="stop signals").start()
        return self

    def _listen(self) -> None:
        first = 0.0
        with self._read:  # closed by this thread alone, which may be between two reads when the other end is
            while data := self._read.recv(1):
                number = data[0]
                if number not in STOPPING:
                    continue
                if not self.received:
                    self.received, first = number, time.monotonic()
                    if self._give_up_s < math.inf and number != signal.SIGINT:
                        threading.Thread(target=self._give_up, daemon=True, name="give up").start()
                elif number == signal.SIGINT and time.monotonic() - first > 1:
                    os._exit(130)

    def _give_up(self) -> None:
        if not self._heeded.wait(self._give_up_s):
            try:
                self.on_give_up()
            finally:
                os._exit(75)

    def heed(self, agreed: int) -> int:
        """The agreed signal; one that is not 0 means that the run is ending in good order."""
        if agreed:
            self._heeded.set()
        return agreed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heeded.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._write.close()


def exit_code(number: int) -> int:
    """How a run that was stopped and saved ends: 130 after Ctrl-C, otherwise 75, which means: requeue me."""
    return 130 if number == signal.SIGINT else 75


def give_up_s() -> float:
    """Seconds that ``sslx submit`` gives the ranks to agree on stopping; without a cluster there is no hurry."""
    return float(os.environ.get("SSLX_GIVE_UP_S", "inf"))
