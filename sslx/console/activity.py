"""What this process is busy with, in words: whoever waits for it is shown that, however deep in the code it happens."""

import time
from collections.abc import Generator
from contextlib import contextmanager

_tasks: list[tuple[str, float]] = []


@contextmanager
def doing(what: str) -> Generator[None]:
    """While it is entered, the process is busy with this, such as "listing images"; the innermost one counts.

    Also a decorator, of a function that this is what it does.
    """
    task = (what, time.monotonic())
    _tasks.append(task)
    try:
        yield
    finally:
        _tasks.remove(task)


def current() -> tuple[str, float]:
    """(what the process is busy with, for how many seconds); ("", 0) where nobody has said so.  From any thread."""
    tasks = _tasks[-1:]  # one operation: another thread may end the task meanwhile
    return (tasks[0][0], time.monotonic() - tasks[0][1]) if tasks else ("", 0.0)
