"""Signals that ask a run to stop: they only set a flag, which the ranks agree on between two steps."""

import os
import signal
import socket
import threading
import time
from types import TracebackType
from typing import Self

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # Ctrl-C, Slurm's preemption, submitit's


class StopSignals:
    """While it is entered, ``received`` is the number of the first stopping signal that came, or 0.

    A thread reads the signals, since a Python handler does not run while the main thread sits in a collective.
    A second Ctrl-C ends the process at once; one within a second is the same one, sent by terminal and launcher.
    """

    def __init__(self) -> None:
        self.received = 0
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
                elif number == signal.SIGINT and time.monotonic() - first > 1:
                    os._exit(130)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._write.close()


def exit_code(number: int) -> int:
    """How a run that was stopped and saved ends: 130 after Ctrl-C, otherwise 75, which means: requeue me."""
    return 130 if number == signal.SIGINT else 75
