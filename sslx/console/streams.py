"""Standard output and error that no full disk, closed descriptor or ASCII locale can end a command through.

A closed pipe still does (``sslx ... | head``): its reader has seen enough.
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
    """Make ``sys.stdout`` and ``sys.stderr`` safe to write to; a second call changes nothing.

    What their encoding does not have is replaced; what cannot be written (a full disk) is dropped, which the other
    stream says once.  Descriptors 0 to 2 are open afterwards, also in processes that this one starts: otherwise the
    next file that is opened would be given the number of one, and receive what libraries print.
    """
    _open_descriptors()
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = _safe(sys.stdout, 1, "replace")
    sys.stderr = _safe(sys.stderr, 2, "backslashreplace")


def drop_unread() -> None:
    """Send what is left for a closed pipe to /dev/null, so that the interpreter's last flush does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lossy(io.FileIO):
    """A descriptor whose failing writes lose their data instead of raising: ``lost`` is the first error."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of the bytes, or drop those that cannot be written; returns their number either way."""
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except BrokenPipeError:
                raise
            except OSError as error:
                if self.lost is None:
                    self.lost = error
                    _tell_other(self.fileno(), error)
                break
            if written is None:  # the descriptor does not wait by itself, and its reader is slow
                slow = select.poll()
                slow.register(self, select.POLLOUT)
                slow.poll()
            rest = rest[written or 0 :]
        return num_bytes


def _safe(stream: TextIO | None, number: int, errors: str) -> TextIO:
    """The stream itself where it does not write to the descriptor, as under a test, or is safe."""
    if isinstance(stream, io.TextIOWrapper):
        below: Any = stream.buffer
        if type(stream) is not io.TextIOWrapper or isinstance(getattr(below, "raw", below), Lossy):
            return stream
        with suppress(OSError, ValueError):
            if stream.fileno() != number:
                return stream
            stream.flush()
    elif stream is not None:
        return stream
    lines = stream.line_buffering if stream else number == 2
    at_once = stream.write_through if stream else False
    encoding = stream.encoding if stream else "utf-8"
    raw: Any = Lossy(number)
    buffer: Any = raw if at_once else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding, errors, line_buffering=lines, write_through=at_once)


def _tell_other(number: int, error: OSError) -> None:
    name, other = ("standard output", 2) if number == 1 else ("standard error", 1)
    with suppress(OSError):
        os.write(other, f"cannot write to {name} ({error.strerror}): what was to be printed is lost\n".encode())


def _open_descriptors() -> None:
    """Point those of 0, 1 and 2 that are closed to /dev/null."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
