"""Signal handling before training handles signals itself, and after its outcome is written.

This module imports nothing heavy.  ``sslx.train.signals`` takes over while there is something to save.
"""

import os
import signal
import sys
from types import FrameType

from sslx.machine import proc

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
"""Ctrl-C; Slurm's preemption; submitit's; a closing terminal; a CPU time limit (ulimit -St, once per second)."""
LAUNCHER = "SSLX_LAUNCHER"
"""Variable with the pid of the launcher of this rank; the rank ends with it."""

_has_begun = _saves = False
_is_decided = False
_notice = False


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal stopped: 130 after Ctrl-C, else 75, which requests a requeue."""
    return 130 if number == signal.SIGINT else 75


def begin(saves: bool) -> None:
    """Handle signals from the first line of the ``sslx`` command on.

    Until other handlers are installed, Ctrl-C ends the process with one line and exit code 130.  saves: the command
    trains, so the other stopping signals end it too, with 75, and SIGUSR1 has no effect.  Without it, they are left
    alone.
    """
    global _has_begun, _saves
    _has_begun, _saves = True, saves
    if launcher := os.environ.pop(LAUNCHER, ""):
        _end_with_launcher(int(launcher))
    for number in STOPPING if saves else STOPPING[:1]:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _leave_early)
    if saves:
        signal.signal(signal.SIGUSR1, _do_nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPPING, signal.SIGUSR1))  # the launcher has blocked them so far


def show_notice(text: str) -> None:
    """Show on rank 0's terminal what takes long, until ``clear_notice``.  Nothing is written to a file."""
    global _notice
    try:
        is_shown = _is_main() and os.isatty(1) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        if is_shown and os.environ.get("TTY_COMPATIBLE") != "0":  # a job's terminal is really a log file
            _notice = os.write(1, b"\r\x1b[K" + text.encode()) > 0
    except OSError:
        pass


def clear_notice() -> None:
    """Erase the notice, if there is one.  Safe in a signal handler."""
    global _notice
    if _notice:
        _notice = False
        try:
            os.write(1, b"\r\x1b[K")
        except OSError:
            pass


def _is_main() -> bool:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def finish_imports() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again, in a command that has nothing to save, once modules are imported."""
    clear_notice()
    if _has_begun and not _saves:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def decide_outcome() -> None:
    """Mark the outcome as decided, so that signals no longer change it."""
    global _is_decided
    _is_decided = True


def ignore_signals() -> None:
    """Ignore signals until the process has ended; Python's own shutdown would restore the default handlers."""
    if _has_begun:
        for number in (*STOPPING, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


def _leave_early(number: int, _: FrameType | None) -> None:
    global _is_decided
    if _is_decided:
        return
    _is_decided = True  # the next signal may come before the process has ended
    if _is_main():
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name} before the first step"
        say(f"error: interrupted{name}")
    leave(exit_code(number))


def _do_nothing(number: int, _: FrameType | None) -> None:
    """Handle SIGUSR1, which means something only during training."""


def say(line: str) -> None:
    """Write a line to stderr, bypassing all buffers, even in a signal handler.  Ignore errors."""
    clear_notice()
    try:
        os.write(2, f"{line}\n".encode(errors="replace"))
    except OSError:
        pass


def leave(code: int) -> None:
    """End this process immediately, from any thread, with all processes that it started."""
    try:
        for pid in proc.descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
    finally:
        os._exit(code)


def _end_with_launcher(launcher: int) -> None:
    """Let the kernel kill this process when the launcher dies, even by SIGKILL (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
