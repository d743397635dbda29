"""What the user of a run sees: a live display on a terminal; elsewhere, as in a file or under Slurm, a line each time.

The metrics that it words in its own way are epoch, loss, lr, samples_per_s and data_wait (the share of the time spent
waiting for the loader, 0 to 1); all others are shown by name.
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

SAID_AFTER_S = 2.0
"""Seconds after which a line says what the run is busy with, where there is no live display."""
_SHOWN_AFTER_S = 1.0  # below metrics, where a line that comes and goes disturbs
_LONGEST_LINE = 100
_SAMPLE_S, _NUM_SAMPLES = 0.5, 120  # the pace of the last minute, or of the last 120 steps if they take longer

_WORDED: dict[str, Callable[[float], str]] = {
    "epoch": lambda value: f"epoch {value:.2f}",
    "loss": lambda value: f"loss {value:#.4g}",
    "lr": lambda value: f"lr {value:#.3g}",
    "samples_per_s": lambda value: f"{value:,.0f} samples/s",
    "data_wait": lambda value: f"data {100 * value:.0f} %",
}
_UNSAID = ("slowest_rank", "slowest_rank_s", "other_ranks_s")
"""Metrics that the display leaves out: a line says so where one rank keeps the others waiting."""
_EXPLAINED = {
    "alignment": "similarity of two views of an image (near 1: alike)",
    "std": "spread of the embeddings (near 0: collapsed)",
    "grad_norm": "length of the gradient, before it is clipped",
    "feature_rank": "number of directions in use (near 1: collapsed)",
    "feature_std": "spread (near 0: collapsed)",
    "feature_alignment": "distance between two views of an image (lower is better)",
    "feature_uniformity": "evenness over all directions (lower is better)",
    "knn": "share of images whose nearest neighbors tell their class",
}
"""What numbers without labels mean: said where one appears for the first time."""


class Screen(Console):
    """A console that never hides the cursor: nothing would bring it back after a kill, a crash or Ctrl-Z."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is."""
        del show
        return False


class Terminal:
    """A live display on a terminal; elsewhere a line each time.  Not enabled, as on other ranks, every call is silent.

    It is up while it is entered: at first it says what the run is busy with (``sslx.console.activity``); from ``begin``
    on it also shows how far the run has come.  Its last line is empty, which is where the cursor stands: what the
    terminal echoes (^C) is wiped with the next frame, and a shell's prompt has a line of its own however the process
    ends.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled, self.console = enabled, console or Screen()
        self._total = self._step = 0
        self._metrics: dict[str, float] = {}
        self._times = deque[tuple[float, int]](maxlen=_NUM_SAMPLES)  # from the first step's end on: it may compile
        self._latest = self._start_s = time.monotonic()
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        self._explained: set[str] = set()
        self._left = threading.Event()
        self._is_unread = False

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            own_stderr = sys.stderr.isatty()  # else it goes to a file, past the display
            self._live = Live(self, console=self.console, refresh_per_second=4, redirect_stderr=own_stderr)
            self._live.start(refresh=True)
        else:
            threading.Thread(target=self._say_what_takes_long, daemon=True, name="activity").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, total_steps: int, start_step: int = 0) -> None:
        """The run takes so many steps in all, of which these are done."""
        self._total, self._step = total_steps, start_step
        self._metrics, self._start_s = {}, time.monotonic()
        self._times.clear()

    def advance(self, step: int) -> None:
        """This step is done.  Costs nothing; called after each, also where no metrics are fetched."""
        now = time.monotonic()
        if not self._times or now - self._times[-1][0] >= _SAMPLE_S:
            self._times.append((now, step))
        self._step, self._latest = step, now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics; where there is no live display, in a line."""
        if not self.enabled:
            return
        if step > self._step or not self._times:
            self.advance(step)
        self._metrics = {**self._metrics, **metrics}  # a new dict: the display's thread may read the old
        self._explain(metrics)
        if self._live is None:
            fields = [self._count(), *_worded(metrics), *_named(metrics), f"ETA {self._eta()}"]
            self.message("  ".join(fields))

    def message(self, text: str) -> None:
        """Print a line, above the live display where there is one.

        On a terminal it is wrapped between words; one that is indented, as a command to copy, is not.
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
        """End the live display; lines can be printed all the same.  Twice does no harm."""
        self._left.set()
        if (live := self._live) is not None:
            live.stop()
            self._live = None

    def _explain(self, metrics: Mapping[str, float]) -> None:
        """Say what these numbers mean, once each."""
        new = [name for name in metrics if name in _EXPLAINED and name not in self._explained]
        self._explained.update(new)
        if new:
            self.message("; ".join(f"{name}: {_EXPLAINED[name]}" for name in new))

    def _say_what_takes_long(self) -> None:
        """In a thread: a line on each thing that takes long, the first time that it does."""
        said: set[str] = set()
        while not self._left.wait(_SAMPLE_S):
            what, since_s = activity.current()
            if since_s >= SAID_AFTER_S and what not in said:
                said.add(what)
                try:
                    self.message(f"{what} ...")
                except (BrokenPipeError, SystemExit):  # rich exits on the former, here from this thread alone
                    self._is_unread = True
                    return

    def __rich__(self) -> RenderableType:
        what, since_s = activity.current()
        busy = Text(f"{what} ... {clock(since_s)}", style="dim", no_wrap=True, overflow="ellipsis")
        is_up = not self._left.is_set()
        if not self._total:
            start = Table.grid(padding=(0, 2, 0, 0))
            start.add_row(self._spinner, busy if what else Text("starting ...", style="dim"))
            return Group(start, Text("")) if is_up else Group()
        width = min(self.console.width, _LONGEST_LINE)
        fields = [_styled(line) for line in _lines(_worded(self._metrics), width)]
        fields += [Text(line, style="dim") for line in _lines(_named(self._metrics), width)]
        if is_up and what and (since_s >= _SHOWN_AFTER_S or not fields):
            fields.append(busy)
        return Constrain(Group(self._head(is_up), *fields, *[Text("")] * is_up), width)

    def _head(self, is_up: bool) -> Table:
        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, 1, None, None, None):
            head.add_column(no_wrap=True, ratio=ratio)
        done = self._step >= self._total
        over = done or not is_up
        left = f"took {clock(time.monotonic() - self._start_s)}" if over else f"ETA {self._eta():>7}"
        head.add_row(
            Text("✓", "green") if done else self._spinner if is_up else Text("■", "yellow"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            f"{100 * self._step // max(self._total, 1):>3} %",
            self._count(),
            left,
        )
        return head

    def _count(self) -> str:
        return f"step {self._step:>{len(str(self._total))}}/{self._total}"

    def _eta(self) -> str:
        """Time left at the pace of the last minute, less what the present step has taken so far."""
        left = self._total - self._step
        if left <= 0:
            return "0:00"
        if not self._times or self._times[0][1] >= self._step:
            return "-:--"
        since, first = self._times[0]
        step_s = (self._latest - since) / (self._step - first)
        return clock(left * step_s - min(time.monotonic() - self._latest, step_s))


def clock(seconds: float) -> str:
    """A duration as people read it: m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _lines(fields: list[str], width: int) -> list[str]:
    """The fields side by side, two spaces apart, on as many lines as they need."""
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


def _worded(metrics: Mapping[str, float]) -> list[str]:
    return [word(metrics[name]) for name, word in _WORDED.items() if name in metrics]


def _named(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in metrics.items() if name not in _WORDED and name not in _UNSAID]
