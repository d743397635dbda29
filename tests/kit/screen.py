"""A terminal of 80 columns for a process, and what stands on it in the end."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HEIGHT, WIDTH = 100, 80
CONTROL = r"\x1b\[[0-9;?]*[A-Za-z]"


def lines_on(sent: str) -> list[str]:
    """The lines that stand on a terminal after this: it knows the controls that rich sends, wide enough for all."""
    lines, row, column = [""], 0, 0
    for part in re.findall(rf"{CONTROL}|[^\x1b]", sent):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[K":
            lines[row] = lines[row][:column]
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
            assert row >= 0
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return lines


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid, self._descriptor = pid, descriptor
        self.sent = ""
        self.code: int | None = None

    @property
    def lines(self) -> list[str]:
        return lines_on(self.sent)

    def _read(self) -> bool:
        """Take in what there is; False at the end."""
        if select.select([self._descriptor], [], [], 0.05)[0]:
            try:
                part = os.read(self._descriptor, 65536)
            except OSError:  # how Linux says that nobody has it open any more
                part = b""
            self.sent += part.decode(errors="replace")
            return bool(part)
        return True

    def until(self, shown: Callable[[str], object], what: str, timeout_s: float = 240) -> float:
        """Wait until what has been sent is so; returns the seconds it took."""
        start = time.monotonic()
        while not shown(self.sent):
            assert self._read(), f"{what}: it ended\n" + "\n".join(self.lines)
            assert time.monotonic() - start < timeout_s, f"{what}: not after {timeout_s} s\n" + "\n".join(self.lines)
        return time.monotonic() - start

    def press_ctrl_c(self) -> None:
        os.write(self._descriptor, b"\x03")

    def wait(self, timeout_s: float = 240) -> int:
        """Its exit code."""
        deadline = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < deadline, "\n".join(self.lines)
        return self._reap()

    def hang_up(self) -> int:
        """Close the terminal; the exit code of its process."""
        os.close(self._descriptor)
        return self._reap()

    def _reap(self) -> int:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@contextmanager
def sslx_on_a_terminal(*argv: str | Path) -> Iterator[Terminal]:
    """``sslx`` with these arguments; whatever is left of it at the end is hung up and killed."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-m", "sslx", *map(str, argv)])
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    terminal = Terminal(pid, descriptor)
    try:
        yield terminal
    finally:
        if terminal.code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # hung up
            os.close(descriptor)
