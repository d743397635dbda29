"""One process a rank on this machine: started together, told of signals, and none of them left at the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from sslx import distributed
from sslx.machine import cores, interrupts, proc
from sslx.machine.interrupts import LAUNCHER, STOPPING, exit_code
from sslx.train.signals import GIVE_UP_S, LAST_WORDS_S, give_up_s

_Child = subprocess.Popen[bytes]
NOTICE_S = 10.0
"""Once a rank has ended otherwise than well, the others have so many seconds to notice by themselves."""


def start(argv: Sequence[str], ranks: int, subcommand: str = "pretrain") -> int:
    """Run ``sslx`` with this subcommand once a rank, on this machine; returns the first failing rank's code, or 0.

    Each rank is a session of its own, so that a Ctrl-C reaches it once, through this process, which also holds the
    store at which they meet.
    """
    store = distributed.host_store()
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", LAUNCHER: str(os.getpid())}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cores.share(ranks))}
    launched, previous = _Launched(), dict[int, Any]()
    interrupts.notice("starting ...")  # until rank 0 has something to say
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, signal.SIGUSR1))  # by the ranks' Python too
    try:
        for rank in range(ranks):
            command = [sys.executable, "-m", "sslx", subcommand, *argv]
            environ = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            launched.children.append(subprocess.Popen(command, env=environ, start_new_session=True))
        for number in (*STOPPING, signal.SIGUSR1) if subcommand == "pretrain" else STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                previous[number] = signal.signal(number, launched.forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        code = launched.wait()
        if subcommand == "pretrain":
            interrupts.settle()
        return code
    finally:
        launched.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Launched:
    """The ranks' processes, and what this one has been told meanwhile."""

    def __init__(self) -> None:
        self.children: list[_Child] = []
        self._received, self._at_s = 0, 0.0
        self._end_now_s = float("inf")

    def forward(self, number: int, _: FrameType | None) -> None:
        """The handler of all signals: what comes is passed on.  A second Ctrl-C ends all ranks, as it does each."""
        now = time.monotonic()
        if number == signal.SIGINT and self._received and now - self._at_s > 1:
            self._end_now_s = min(self._end_now_s, now + LAST_WORDS_S + 1)  # the ranks end by themselves until then
        if number != signal.SIGUSR1 and not self._received:
            self._received, self._at_s = number, now
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def wait(self) -> int:
        """Wait for all; returns the first failing rank's exit code as a shell says it (137 for SIGKILL), or 0.

        A rank that ends the run takes the others with it, which have some seconds to notice by themselves.
        """
        first, deadline = 0, float("inf")
        while (codes := [child.poll() for child in self.children]).count(None):
            if not first and (first := next((code for code in codes if code), 0)):
                deadline = time.monotonic() + NOTICE_S
                if first in (exit_code(signal.SIGINT), exit_code(signal.SIGTERM)):  # it may be the only one that knows
                    self._tell_the_rest()
            if time.monotonic() > self._end_now_s:
                return exit_code(signal.SIGINT)
            if time.monotonic() > deadline or (first and self._rest_is_stopped()):
                break
            if self._gives_up():
                sys.stderr.write("all ranks are stopped (SIGSTOP): ended at the last checkpoint\n")
                return exit_code(self._received)
            time.sleep(0.05)
        first = first or next((code for code in codes if code), 0)
        return 128 - first if first < 0 else first

    def _tell_the_rest(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    def _gives_up(self) -> bool:
        """Whether a signal has come, no rank is left that could heed it, and they have had the time."""
        late = bool(self._received) and time.monotonic() - self._at_s > (give_up_s() or GIVE_UP_S)
        return late and self._rest_is_stopped()

    def _rest_is_stopped(self) -> bool:
        return all(proc.state(child.pid) == "T" for child in self.children if child.poll() is None)

    def kill(self) -> None:
        """End what is left of the ranks, and of what they have started."""
        for child in self.children:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
