"""Facts about processes from Linux's /proc.  Without it (macOS), every function returns that it does not know."""

import os
from pathlib import Path

ROOT = Path("/proc")


def read(name: str) -> str:
    """Return the text of a file below /proc, or "" if it cannot be read."""
    try:
        return (ROOT / name).read_text()
    except OSError:
        return ""


def state(pid: int) -> str:
    """Return a process's state as Linux's letter: R, S, D (waits for a disk), T (stopped), Z (ended); "" if unknown."""
    return (_stat(pid) or [""])[0]


def started(pid: int) -> str | None:
    """Return when a process started, in clock ticks; "" if it is a zombie, and None if unknown."""
    fields = _stat(pid)
    if not fields:
        return None
    return "" if fields[0] in "ZX" else fields[19]


def descendants(ancestor: int) -> list[int]:
    """Return all descendants of a process, nearest first, or [] if unknown."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        if fields := _stat(pid):
            children.setdefault(int(fields[1]), []).append(pid)
    pids = [ancestor]
    for pid in pids:
        pids += children.get(pid, [])
    return pids[1:]


def command(pid: str) -> bytes | None:
    """Return a process's command line, with arguments separated by NUL, or None if unknown."""
    try:
        return (ROOT / pid / "cmdline").read_bytes()
    except OSError:
        return None


def link(name: str) -> str:
    """Return the target of a symbolic link below /proc, or "" if unknown."""
    try:
        return os.readlink(ROOT / name)
    except OSError:
        return ""


def exists() -> bool:
    """Return whether this system has /proc."""
    return (ROOT / "self").is_dir()


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(ROOT) if name.isdecimal()]
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on; the second, the process name, may hold anything."""
    try:
        fields = (ROOT / str(pid) / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []
    return fields if len(fields) > 19 else []
