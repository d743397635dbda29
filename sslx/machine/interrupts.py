"""Signals from a process's first line on: before training listens to them, and after its outcome is written.

Imports nothing heavy.  ``sslx.train.signals`` takes over while there is something to save.
"""

import os
import signal
import sys
from types import FrameType

from sslx.machine import proc

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""Ctrl-C, Slurm's preemption, submitit's, a terminal that closes, a limit of CPU time (ulimit -St, once a second)."""
LAUNCHER = "SSLX_LAUNCHER"
"""The process that started this rank, whose end is this one's too."""

_has_begun = _saves = False
_is_settled = False
_notice = False


def exit_code(number: int) -> int:
    """How a run that a signal stopped ends: 130 after Ctrl-C, otherwise 75, which means: requeue me."""
    return 130 if number == signal.SIGINT else 75


def begin(saves: bool) -> None:
    """To be called in the first line of a process that is the ``sslx`` command.

    Until something else listens, Ctrl-C ends it with one line and 130.  saves: so do the other stopping signals, with
    75, and SIGUSR1 does nothing; otherwise they are left alone.
    """
    global _has_begun, _saves
    _has_begun, _saves = True, saves
    if launcher := os.environ.pop(LAUNCHER, ""):
        _die_with(int(launcher))
    for number in STOPPING if saves else STOPPING[:1]:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _leave_early)
    if saves:
        signal.signal(signal.SIGUSR1, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, signal.SIGUSR1))  # the launcher blocked them until now


def notice(words: str) -> None:
    """Show what takes long, on a terminal and of rank 0 alone, until ``clear``; a file gets nothing."""
    global _notice
    try:
        is_shown = _is_main() and os.isatty(1) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        if is_shown and os.environ.get("TTY_COMPATIBLE") != "0":  # of a job: a file after all
            _notice = os.write(1, b"\r\x1b[K" + words.encode()) > 0
    except OSError:
        pass


def clear() -> None:
    """Wipe the notice, if there is one, from wherever this is."""
    global _notice
    if _notice:
        _notice = False
        try:
            os.write(1, b"\r\x1b[K")
        except OSError:
            pass


def _is_main() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def has_imported() -> None:
    """All modules are there: Ctrl-C raises KeyboardInterrupt again in a command that has only to tidy up then."""
    clear()
    if _has_begun and not _saves:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def settle() -> None:
    """The outcome is decided: no signal changes it any more."""
    global _is_settled
    _is_settled = True


def end() -> None:
    """The process is about to end: until it has, signals are ignored; Python's own end would put back the defaults."""
    if _has_begun:
        for number in (*STOPPING, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _leave_early(number: int, _: FrameType | None) -> None:
    global _is_settled
    if _is_settled:
        return
    _is_settled = True  # by this signal: the next one may come before the process is gone
    if _is_main():
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name} before the first step"
        say(f"error: interrupted{name}")
    leave(exit_code(number))


def _note(number: int, _: FrameType | None) -> None:
    """SIGUSR1, to which training has an answer; others have none."""


def say(line: str) -> None:
    """Write a line to stderr from wherever this is, past all buffers; where nothing can be written, be silent."""
    clear()
    try:
        os.write(2, f"{line}\n".encode(errors="replace"))
    except OSError:
        pass


def leave(code: int) -> None:
    """End this process now, from any thread, and all that it started."""
    try:
        for pid in proc.descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
    finally:
        os._exit(code)


def _die_with(launcher: int) -> None:
    """Be killed when the launcher dies, even by SIGKILL (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
