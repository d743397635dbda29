"""What Linux's /proc tells of processes.  Where there is none (macOS), every function says that it does not know."""

import os
from pathlib import Path

ROOT = Path("/proc")


def read(name: str) -> str:
    """A text file below /proc, "" where there is none."""
    try:
        return (ROOT / name).read_text()
    except OSError:
        return ""


def state(pid: int) -> str:
    """What a process does, by Linux's letter: R, S, D (it waits for a disk), T (stopped), Z (ended); "" if unknown."""
    return (_stat(pid) or [""])[0]


def started(pid: int) -> str | None:
    """When a process began, in the clock's ticks; "" for one whose end its parent has not noticed, None if unknown."""
    fields = _stat(pid)
    if not fields:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def descendants(ancestor: int) -> list[int]:
    """The processes below this one, nearest first; [] if unknown."""
    below: dict[int, list[int]] = {}
    for pid in _pids():
        if fields := _stat(pid):
            below.setdefault(int(fields[1]), []).append(pid)
    pids = [ancestor]
    for pid in pids:
        pids += below.get(pid, [])
    return pids[1:]


def command(pid: str) -> bytes | None:
    """The command line of a process, its arguments separated by NUL; None if unknown."""
    try:
        return (ROOT / pid / "cmdline").read_bytes()
    except OSError:
        return None


def link(name: str) -> str:
    """Where a symbolic link below /proc leads, "" if unknown."""
    try:
        return os.readlink(ROOT / name)
    except OSError:
        return ""


def exists() -> bool:
    """Whether this system has /proc."""
    return (ROOT / "self").is_dir()


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(ROOT) if name.isdecimal()]
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one on: a process's name may hold anything."""
    try:
        fields = (ROOT / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []
    return fields if len(fields) > 19 else []
