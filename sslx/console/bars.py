"""A progress bar over the stages of a command, and lines that wrap on a terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslx.console.words import wrapped


class Bars:
    """A progress bar over the stages of a command, removed at the end.  Shown only by rank 0 on a terminal."""

    def __init__(self, console: Console, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        visible = enabled and console.is_terminal
        quiet = Console(quiet=True)  # rich 14 ends a bar with a newline even if the bar is disabled
        self.display = Progress(*columns, console=console if visible else quiet, transient=True, disable=not visible)
        self._task = self.display.add_task("", total=None)
        self._name = self.stage = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        name = f"{self.stage}: {what}"
        if name != self._name:  # each task has its own remaining time
            self.display.reset(self._task, description=name, total=total)
            self._name = name
        self.display.update(self._task, completed=done, total=total)


def say_to(console: Console, enabled: bool) -> Callable[[str], None]:
    """Return a function that prints lines if enabled.  On a terminal, they are wrapped between words."""

    def say(line: str) -> None:
        text = wrapped(line, console.width) if console.is_terminal else line
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    return say if enabled else lambda _: None
