"""Explain what the operating system refused: memory, open files, processes.  This module imports nothing heavy."""

import errno
import os
import re
import resource
import sys

from sslx.errors import ConfigError
from sslx.machine import cores

EXIT_CODE = 64
"""The same as for too little GPU memory: another start on the same machine would end the same way."""
MIN_FILES = 64
"""Number of files that a rank opens, with a loader of a few workers."""

_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|failed to map segment|bad_alloc|"
    r"cannot apply additional memory protection|cannot allocate memory in static TLS|out of memory allocating",
    re.IGNORECASE,
)
_FILES = re.compile(r"too many open files|EMFILE", re.IGNORECASE)
_TASKS = re.compile(r"can't start new thread|Resource temporarily unavailable|pthread_create", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """Explain in one line the limit behind an error or one of its causes, or return None for other errors."""
    seen = set[int]()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if explanation := _explain(link):
            return explanation
        link = link.__cause__ or link.__context__
    return None


def raise_file_limit() -> None:
    """Let this process and its children open as many files as they may.

    Raise ConfigError if that is so few that libraries would fail midway with messages of their own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
        raise ConfigError(
            f"expected at least {MIN_FILES} open files per process, got a limit of {hard} (ulimit -Hn): raise the limit"
        )


def min_memory_bytes() -> int:
    """Return the bytes of address space that a process needs on its cores, most of which it never touches.

    On 2 cores, torch with its CUDA libraries reserves 4 GiB, and DALI with its threads 1.2 GiB more.  Stacks, malloc's
    arenas and OpenBLAS's buffers grow with the number of cores.
    """
    return 5 * 2**30 + 2**28 * cores.allowed()


def check_memory() -> None:
    """Raise ConfigError if the limit on address space (ulimit -v) is too low.  Call before libraries are loaded.

    With too little, OpenBLAS retries forever or interrupts the process.
    """
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    minimum = min_memory_bytes()
    if soft != resource.RLIM_INFINITY and soft < minimum:
        raise ConfigError(
            f"expected at least {minimum / 2**30:.1f} GiB of address space, which torch and others reserve, got a "
            f"limit of {soft / 2**30:.1f} GiB (ulimit -v): raise the limit, or limit memory with a cgroup"
        )


def free_memory_bytes() -> float:
    """Return the bytes of memory that are free for this process now, or inf if that is unknown."""
    free = float("inf")
    try:
        with open("/proc/meminfo") as file:
            free = next(float(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with open("/sys/fs/cgroup/memory.max") as maximum, open("/sys/fs/cgroup/memory.current") as current:
            if (limit := maximum.read().strip()).isdecimal():
                free = min(free, float(limit) - float(current.read()))
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
    # A C extension whose allocation failed may raise a SystemError without a message.  Without a memory limit, such an
    # error has another cause.
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    is_silent = isinstance(error, SystemError) and is_limited
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text) or is_silent:
        request = re.search(r"tried to allocate (\d+) bytes", text)
        size = f" ({int(request.group(1)) / 2**30:.2f} GiB requested at once)" if request else ""
        return (
            f"out of host memory{size}: this process may use {_limit(resource.RLIMIT_AS, 2**30)} GiB of address space "
            "(ulimit -v): raise the limit, add memory, or use a smaller --batch-size, --data.size or --data.threads"
        )
    if number == errno.EAGAIN or (isinstance(error, RuntimeError | OSError) and _TASKS.search(text)):
        return (
            f"cannot start another process or thread: this user may have {_limit(resource.RLIMIT_NPROC)} (ulimit -u): "
            "raise the limit, or use fewer ranks or a smaller --data.threads"
        )
    return None


def _limit(resource_id: int, unit: int = 1) -> str:
    soft = resource.getrlimit(resource_id)[0]
    if soft == resource.RLIM_INFINITY:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / unit:.1f}" if unit > 1 else "any number"
    return f"{soft / unit:.1f}" if unit > 1 else f"{soft:,}"
