"""Files whose reading hangs, as on a mount that no longer answers: another process holds a lease on them.

Opening such a file waits until the lease is given back, at most /proc/sys/fs/lease-break-time seconds (45).
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

F_SETLEASE = 1024


@contextmanager
def hanging(paths: Sequence[str | Path]) -> Generator[None]:
    """While it is entered, these files exist, and to open one waits."""
    command = [sys.executable, __file__, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.kill()


if __name__ == "__main__":
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's wish to have the lease back
    for path in sys.argv[1:]:
        held = os.open(path, os.O_RDWR)
        while True:
            try:
                fcntl.fcntl(held, F_SETLEASE, fcntl.F_WRLCK)
                break
            except BlockingIOError:  # somebody is reading it
                time.sleep(0.001)
    sys.stdout.write("held\n")
    sys.stdout.flush()
    signal.pause()
