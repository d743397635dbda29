"""The progress of a call that takes longer than two seconds: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Progress = Callable[[int, int | None], None]
"""Called as ``progress(num_done, num_total)``; the total is None if it is not known."""
AFTER_S, LINE_EVERY_S = 2.0, 10.0


@contextmanager
def reporting(choice: "bool | Progress | None", what: str) -> Generator[Progress]:
    """Return the function to which a call reports its progress.

    choice: a function of one's own; True to show progress anywhere and False nowhere; None to show it on a terminal
    only, and so not in a notebook.  what: what is done, in words.
    """
    if callable(choice):
        yield choice
        return
    display = _Display(what) if choice or (choice is None and sys.stderr.isatty()) else None
    try:
        yield display.show if display else _ignore
    finally:
        if display and display.bar:
            display.bar.stop()


def _ignore(num_done: int, num_total: int | None) -> None:
    """Show nothing."""


class _Display:
    """Shows nothing before ``AFTER_S`` seconds.  rich is imported only then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._start = time.monotonic()
        self._next_s = AFTER_S
        self.bar: Bar | None = None

    def show(self, num_done: int, num_total: int | None) -> None:
        elapsed_s = time.monotonic() - self._start
        if elapsed_s < AFTER_S:
            return
        if sys.stderr.isatty():
            self._draw(num_done, num_total)
        elif elapsed_s >= self._next_s:
            self._next_s = elapsed_s + LINE_EVERY_S
            of_all = "" if num_total is None else f" of {num_total:,}"
            sys.stderr.write(f"{self.what}: {num_done:,}{of_all}, {num_done / elapsed_s:,.0f} per second\n")
            sys.stderr.flush()

    def _draw(self, num_done: int, num_total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task(self.what, total=num_total)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=num_done)
