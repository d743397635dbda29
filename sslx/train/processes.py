"""One process per rank on this machine: started together, sent signals, and none left at the end."""

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

_Process = subprocess.Popen[bytes]
NOTICE_S = 10.0
"""Seconds for the other ranks to notice that a rank has failed."""


def start(argv: Sequence[str], ranks: int, subcommand: str = "pretrain") -> int:
    """Run ``sslx`` with this subcommand once per rank, on this machine.  Return the first failing rank's code, or 0.

    Each rank has its own session, so that a Ctrl-C reaches it once, through this process, which also hosts the store
    at which the ranks meet.
    """
    store = distributed.host_store()
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", LAUNCHER: str(os.getpid())}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(cores.per_process(ranks))}
    children, previous = _Children(), dict[int, Any]()
    interrupts.show_notice("starting ...")  # until rank 0 prints something
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, signal.SIGUSR1))  # inherited by the ranks
    try:
        for rank in range(ranks):
            command = [sys.executable, "-m", "sslx", subcommand, *argv]
            environ = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.processes.append(subprocess.Popen(command, env=environ, start_new_session=True))
        for number in (*STOPPING, signal.SIGUSR1) if subcommand == "pretrain" else STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                previous[number] = signal.signal(number, children.forward)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        code = children.wait()
        if subcommand == "pretrain":
            interrupts.decide_outcome()
        return code
    finally:
        children.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Children:
    """The processes of the ranks, and the signals that this process has received."""

    def __init__(self) -> None:
        self.processes: list[_Process] = []
        self._received, self._at_s = 0, 0.0
        self._end_now_s = float("inf")

    def forward(self, number: int, _: FrameType | None) -> None:
        """Handle a signal by passing it on.  A second Ctrl-C ends all ranks, as it does each of them."""
        now = time.monotonic()
        if number == signal.SIGINT and self._received and now - self._at_s > 1:
            self._end_now_s = min(self._end_now_s, now + LAST_WORDS_S + 1)  # until then, the ranks end by themselves
        if number != signal.SIGUSR1 and not self._received:
            self._received, self._at_s = number, now
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Wait for all ranks.  Return the first failing rank's exit code as a shell does (137 for SIGKILL), or 0.

        A rank that ends the run ends the others, too, which get some seconds to notice by themselves.
        """
        first, deadline = 0, float("inf")
        while (codes := [process.poll() for process in self.processes]).count(None):
            if not first and (first := next((code for code in codes if code), 0)):
                deadline = time.monotonic() + NOTICE_S
                if first in (exit_code(signal.SIGINT), exit_code(signal.SIGTERM)):  # other ranks may not know of it
                    self._stop_others()
            if time.monotonic() > self._end_now_s:
                return exit_code(signal.SIGINT)
            if time.monotonic() > deadline or (first and self._others_are_stopped()):
                break
            if self._must_give_up():
                sys.stderr.write("all ranks are stopped (SIGSTOP): ended them; the last checkpoint remains\n")
                return exit_code(self._received)
            time.sleep(0.05)
        first = first or next((code for code in codes if code), 0)
        return 128 - first if first < 0 else first

    def _stop_others(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _must_give_up(self) -> bool:
        """Return whether a signal came, no rank is able to handle it, and their time is over."""
        late = bool(self._received) and time.monotonic() - self._at_s > (give_up_s() or GIVE_UP_S)
        return late and self._others_are_stopped()

    def _others_are_stopped(self) -> bool:
        return all(proc.state(process.pid) == "T" for process in self.processes if process.poll() is None)

    def kill(self) -> None:
        """End the remaining ranks, and all processes that they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
