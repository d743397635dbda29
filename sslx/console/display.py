"""The output of a run: a live display on a terminal, or one line at a time in a file or under Slurm.

The metrics epoch, loss, lr, samples_per_s and data_wait (the share of time spent waiting for the loader, 0 to 1) have
their own formats; all others are shown by name.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from sslx.console import activity
from sslx.console.words import shown, wrapped

REPORT_AFTER_S = 2.0
"""Seconds after which a line says what the run is busy with, if there is no live display."""
_SHOW_TASK_AFTER_S = 1.0  # below the metrics, where a line that comes and goes would distract
_MAX_WIDTH = 100
_SAMPLE_S, _NUM_SAMPLES = 0.5, 120  # for the pace of the last minute, or of the last 120 steps if they take longer

_FORMATS: dict[str, Callable[[float], str]] = {
    "epoch": lambda value: f"epoch {value:.2f}",
    "loss": lambda value: f"loss {value:#.4g}",
    "lr": lambda value: f"lr {value:#.3g}",
    "samples_per_s": lambda value: f"{value:,.0f} samples/s",
    "data_wait": lambda value: f"data {100 * value:.0f} %",
}
_HIDDEN = ("slowest_rank", "slowest_rank_s", "other_ranks_s")
"""Metrics that the display omits, because a message says when a rank keeps the others waiting."""
_EXPLANATIONS = {
    "alignment": "similarity of two views of an image (1: identical)",
    "std": "spread of the embeddings (near 0: collapsed)",
    "grad_norm": "length of the gradient, before it is clipped",
    "feature_rank": "number of directions in use (near 1: collapsed)",
    "feature_std": "spread (near 0: collapsed)",
    "feature_alignment": "distance between two views of an image (lower is better)",
    "feature_uniformity": "evenness over all directions (lower is better)",
    "knn": "share of images whose nearest neighbors tell their class",
}
"""Explanations of metrics without labels, printed when a metric first appears."""


class Screen(Console):
    """A console that never hides the cursor, because nothing would restore it after a kill, a crash or Ctrl-Z."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is."""
        del show
        return False


class Terminal:
    """A live display on a terminal, or else one line at a time.  If not enabled, as on other ranks, it is silent.

    It is shown inside a ``with`` block: first the current task (``sslx.console.activity``) and, after ``begin``, also
    the progress of the run.  Its last line is empty and holds the cursor, so that the next frame erases what the
    terminal echoes (^C), and a shell's prompt gets its own line however the process ends.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled, self.console = enabled, console or Screen()
        self._total = self._step = 0
        self._metrics: dict[str, float] = {}
        self._times = deque[tuple[float, int]](maxlen=_NUM_SAMPLES)  # starts after the first step, which may compile
        self._latest = self._start_s = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        self._explained_metrics: set[str] = set()
        self._closed = threading.Event()
        self._is_unread = False

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            own_stderr = sys.stderr.isatty()  # a redirected stderr bypasses the display
            self._live = Live(self, console=self.console, refresh_per_second=4, redirect_stderr=own_stderr)
            self._live.start(refresh=True)
        else:
            threading.Thread(target=self._report_long_tasks, daemon=True, name="activity").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, total_steps: int, start_step: int = 0) -> None:
        """Start to show progress, in a run of ``total_steps`` steps that has done ``start_step`` of them."""
        self._total, self._step = total_steps, start_step
        self._metrics, self._start_s = {}, time.monotonic()
        self._times.clear()

    def advance(self, step: int) -> None:
        """Mark a step as done.  This costs next to nothing; call it after each step, even without metrics."""
        now = time.monotonic()
        if not self._times or now - self._times[-1][0] >= _SAMPLE_S:
            self._times.append((now, step))
        self._step, self._latest = step, now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics in the live display, or print them in a line."""
        if not self.enabled:
            return
        if step > self._step or not self._times:
            self.advance(step)
        self._metrics = {**self._metrics, **metrics}  # a new dict, as the display's thread may still read the old one
        self._explain(metrics)
        if self._live is None:
            fields = [self._count(), *_formatted(metrics), *_named(metrics), f"ETA {self._eta()}"]
            self.message("  ".join(fields))

    def message(self, text: str) -> None:
        """Print a line, above the live display if there is one.

        On a terminal it is wrapped between words, unless it is indented, like a command to copy.
        """
        if self._is_unread:
            raise BrokenPipeError
        if not self.enabled:
            return
        line = shown(text, 4_000)
        if self.console.is_terminal:
            line = wrapped(line, self.console.width)
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """End the live display.  Lines can still be printed, and a second call has no effect."""
        self._closed.set()
        if (live := self._live) is not None:
            live.stop()
            self._live = None

    def _explain(self, metrics: Mapping[str, float]) -> None:
        """Explain metrics when they first appear."""
        new = [name for name in metrics if name in _EXPLANATIONS and name not in self._explained_metrics]
        self._explained_metrics.update(new)
        if new:
            self.message("; ".join(f"{name}: {_EXPLANATIONS[name]}" for name in new))

    def _report_long_tasks(self) -> None:
        """Run in a thread: print a line when a task first takes long."""
        reported: set[str] = set()
        while not self._closed.wait(_SAMPLE_S):
            task, task_s = activity.current()
            if task_s >= REPORT_AFTER_S and task not in reported:
                reported.add(task)
                try:
                    self.message(f"{task} ...")
                except (BrokenPipeError, SystemExit):  # rich raises SystemExit, which here would end only this thread
                    self._is_unread = True
                    return

    def __rich__(self) -> RenderableType:
        task, task_s = activity.current()
        busy = Text(f"{task} ... {clock(task_s)}", style="dim", no_wrap=True, overflow="ellipsis")
        is_open = not self._closed.is_set()
        if not self._total:
            start = Table.grid(padding=(0, 2, 0, 0))
            start.add_row(self._spinner, busy if task else Text("starting ...", style="dim"))
            return Group(start, Text("")) if is_open else Group()
        width = min(self.console.width, _MAX_WIDTH)
        lines = [_styled(line) for line in _lines(_formatted(self._metrics), width)]
        lines += [Text(line, style="dim") for line in _lines(_named(self._metrics), width)]
        if is_open and task and (task_s >= _SHOW_TASK_AFTER_S or not lines):
            lines.append(busy)
        if is_open:
            lines.append(Text(""))
        return Constrain(Group(self._head(is_open), *lines), width)

    def _head(self, is_open: bool) -> Table:
        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, 1, None, None, None):
            head.add_column(no_wrap=True, ratio=ratio)
        is_done = self._step >= self._total
        if is_done or not is_open:
            time_text = f"took {clock(time.monotonic() - self._start_s)}"
        else:
            time_text = f"ETA {self._eta():>7}"
        head.add_row(
            Text("✓", "green") if is_done else self._spinner if is_open else Text("■", "yellow"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            f"{100 * self._step // max(self._total, 1):>3} %",
            self._count(),
            time_text,
        )
        return head

    def _count(self) -> str:
        return f"step {self._step:>{len(str(self._total))}}/{self._total}"

    def _eta(self) -> str:
        """Return the time left at the pace of the last minute, less what the current step has taken so far."""
        num_left = self._total - self._step
        if num_left <= 0:
            return "0:00"
        if not self._times or self._times[0][1] >= self._step:
            return "-:--"
        since, first = self._times[0]
        step_s = (self._latest - since) / (self._step - first)
        return clock(num_left * step_s - min(time.monotonic() - self._latest, step_s))


def clock(seconds: float) -> str:
    """Format a duration as m:ss, or as h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _lines(fields: list[str], width: int) -> list[str]:
    """Join fields with two spaces, on as many lines as the width requires."""
    lines: list[str] = []
    for field in fields:
        if lines and len(lines[-1]) + 2 + len(field) <= width:
            lines[-1] += f"  {field}"
        else:
            lines.append(field)
    return lines


def _styled(field: str) -> Text:
    text = Text(field)
    text.highlight_regex(r"\b[a-zA-Z/]+\b|%", "dim")
    text.highlight_regex(r"\b(nan|inf)\b", "not dim bold red")
    return text


def _formatted(metrics: Mapping[str, float]) -> list[str]:
    return [text(metrics[name]) for name, text in _FORMATS.items() if name in metrics]


def _named(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items() if name not in _FORMATS and name not in _HIDDEN]
