"""What the operating system did not grant, in words: memory, open files, processes.  Imports nothing heavy."""

import errno
import os
import re
import resource
import sys

from sslx.errors import ConfigError
from sslx.machine import cores

EXIT_CODE = 64
"""As for too little GPU memory: the same start on the same machine would end alike."""
FEWEST_FILES = 64
"""What a rank opens with a loader of a few workers."""

_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|failed to map segment|bad_alloc|"
    r"cannot apply additional memory protection|cannot allocate memory in static TLS|out of memory allocating",
    re.IGNORECASE,
)
_FILES = re.compile(r"too many open files|EMFILE", re.IGNORECASE)
_TASKS = re.compile(r"can't start new thread|Resource temporarily unavailable|pthread_create", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """One line about the limit that an error, or what it comes from, ran into; None where it is another error."""
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if words := _explain(link):
            return words
        link = link.__cause__ or link.__context__
    return None


def allow_files() -> None:
    """Let this process, and those that it starts, open as many files as they may.

    ConfigError where these are so few that libraries would fail somewhere in the midst, in words of their own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < FEWEST_FILES:
        raise ConfigError(
            f"expected that a process may open {FEWEST_FILES} files or more, got a limit of {hard} (ulimit -Hn)"
        )


def least_memory() -> int:
    """Bytes of address space that a process needs, most of them never touched, for the cores that it may run on.

    On 2 cores torch with its CUDA libraries reserves 4 GiB, DALI and its threads 1.2 GiB more; what grows with the
    cores are stacks, arenas of malloc and OpenBLAS's buffers.
    """
    return 5 * 2**30 + 2**28 * cores.allowed()


def check_memory() -> None:
    """To be called before libraries are loaded.

    ConfigError where the limit of address space (ulimit -v) is below what they take: with less, OpenBLAS tries again
    for ever, or interrupts the process.
    """
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    least = least_memory()
    if soft != resource.RLIM_INFINITY and soft < least:
        raise ConfigError(
            f"expected {least / 2**30:.1f} GiB of address space or more, which torch and others reserve, got a "
            f"limit of {soft / 2**30:.1f} GiB (ulimit -v): raise the limit, or limit memory by a cgroup"
        )


def free_memory() -> float:
    """Bytes of memory that are free for this process now; inf where that cannot be found out."""
    free = float("inf")
    try:
        with open("/proc/meminfo") as file:
            free = next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as taken:
            if (limit := most.read().strip()).isdecimal():
                free = min(free, float(limit) - float(taken.read()))
    except (OSError, StopIteration, ValueError):
        pass
    return free


def _explain(error: BaseException) -> str | None:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or _FILES.search(text):
        return (
            f"too many open files: this process may open {_limit(resource.RLIMIT_NOFILE)} (ulimit -n): "
            "raise the limit, or use fewer ranks or a smaller --data.threads"
        )
    # What a C extension whose allocation failed may forget to say; of any other cause where memory is not limited.
    speechless = isinstance(error, SystemError) and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text) or speechless:
        asked = re.search(r"tried to allocate (\d+) bytes", text)
        size = f" ({int(asked.group(1)) / 2**30:.2f} GiB asked for at once)" if asked else ""
        return (
            f"out of host memory{size}: this process may use {_limit(resource.RLIMIT_AS, 2**30)} GiB of address space "
            "(ulimit -v): raise the limit, take more memory, or a smaller --batch-size, --data.size or --data.threads"
        )
    if number == errno.EAGAIN or (isinstance(error, RuntimeError | OSError) and _TASKS.search(text)):
        return (
            f"no further process or thread can be started: this user may have {_limit(resource.RLIMIT_NPROC)} (ulimit "
            "-u): raise the limit, or use fewer ranks or a smaller --data.threads"
        )
    return None


def _limit(what: int, unit: int = 1) -> str:
    soft = resource.getrlimit(what)[0]
    if soft == resource.RLIM_INFINITY:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / unit:.1f}" if unit > 1 else "any number"
    return f"{soft / unit:.1f}" if unit > 1 else f"{soft:,}"
