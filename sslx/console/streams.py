"""Standard output and error streams that survive a full disk, a closed descriptor and an ASCII locale.

A closed pipe still ends a command (``sslx ... | head``), because its reader has seen enough.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def make_safe() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` safe to write to.  A second call has no effect.

    Characters that the encoding lacks are replaced.  What cannot be written (full disk) is dropped, and the other
    stream reports that once.  Descriptors 0 to 2 are open afterwards, also in child processes: otherwise the next file
    to be opened would get such a number, and receive what libraries print.
    """
    _open_descriptors()
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = _safe(sys.stdout, 1, "replace")
    sys.stderr = _safe(sys.stderr, 2, "backslashreplace")


def drop_unread() -> None:
    """Redirect a closed pipe to /dev/null, so that the interpreter's last flush does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lossy(io.FileIO):
    """A file descriptor whose failing writes drop their data instead of raising; ``error`` is the first error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.error: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all bytes, or drop those that cannot be written.  Return the number of bytes either way."""
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except BrokenPipeError:
                raise
            except OSError as error:
                if self.error is None:
                    self.error = error
                    _report_on_other(self.fileno(), error)
                break
            if written is None:  # a non-blocking descriptor whose reader is slow
                poll = select.poll()
                poll.register(self, select.POLLOUT)
                poll.poll()
            rest = rest[written or 0 :]
        return num_bytes


def _safe(stream: TextIO | None, number: int, errors: str) -> TextIO:
    """Wrap a stream, unless it is already safe or does not write to the descriptor, as in a test."""
    if isinstance(stream, io.TextIOWrapper):
        binary: Any = stream.buffer
        if type(stream) is not io.TextIOWrapper or isinstance(getattr(binary, "raw", binary), Lossy):
            return stream
        with suppress(OSError, ValueError):
            if stream.fileno() != number:
                return stream
            stream.flush()
    elif stream is not None:
        return stream
    line_buffering = stream.line_buffering if stream else number == 2
    write_through = stream.write_through if stream else False
    encoding = stream.encoding if stream else "utf-8"
    raw: Any = Lossy(number)
    buffer: Any = raw if write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=line_buffering, write_through=write_through)


def _report_on_other(number: int, error: OSError) -> None:
    name, other = ("standard output", 2) if number == 1 else ("standard error", 1)
    with suppress(OSError):
        os.write(other, f"cannot write to {name} ({error.strerror}): further output to it is lost\n".encode())


def _open_descriptors() -> None:
    """Redirect those of descriptors 0, 1 and 2 that are closed to /dev/null."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
