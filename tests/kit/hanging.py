"""Files and folders whose reading hangs, as on a mount that no longer answers.

Another process holds a lease on the files: opening one waits until the lease is given back, at most
/proc/sys/fs/lease-break-time seconds (45).  A folder hangs as the mount of a file system that nobody serves.
"""

import ctypes
import fcntl
import os
import signal
import struct
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


@contextmanager
def hanging_mount(folder: Path) -> Generator[None]:
    """While it is entered, whatever looks into this folder waits, as on a dead server's share.

    It is a file system in user space (FUSE) whose server says hello and then reads no request.  Needs root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    try:
        if libc.mount(b"hanging", os.fsencode(folder), b"fuse.hanging", 0, options):
            raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")
        try:
            request = os.read(server, 2**16)  # FUSE_INIT, whose answer is its number, a version, and zeros
            unique, major, minor = struct.unpack_from("<8xQ24xII", request)
            answer = struct.pack("<II", major, minor) + bytes(56)
            os.write(server, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
            yield
        finally:
            libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH
    finally:
        os.close(server)  # which ends all waiting


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
