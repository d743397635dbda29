"""What this process is currently doing, in words, so that a user who waits can see it, however deep in the code."""

import time
from collections.abc import Generator
from contextlib import contextmanager

_tasks: list[tuple[str, float]] = []


@contextmanager
def doing(what: str) -> Generator[None]:
    """Show that the process is busy with a task, such as "listing images", inside a ``with`` block.

    The innermost task counts.  Also works as a decorator of a function that does the task.
    """
    task = (what, time.monotonic())
    _tasks.append(task)
    try:
        yield
    finally:
        _tasks.remove(task)


def current() -> tuple[str, float]:
    """Return the current task and its duration in seconds, or ("", 0.0) without one.  Safe from any thread."""
    tasks = _tasks[-1:]  # a single operation, because another thread may end the task in the meantime
    return (tasks[0][0], time.monotonic() - tasks[0][1]) if tasks else ("", 0.0)
