"""Metrics and logging: metrics averaged on the device, then written to the display, metrics.jsonl and trackers.

``metrics.jsonl`` in the run folder is the complete record; the display, wandb and TensorBoard show its contents.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sslx.console import activity
from sslx.console.display import Terminal
from sslx.console.words import shown
from sslx.errors import StorageError
from sslx.machine import files
from sslx.runs import records
from sslx.runs.config import LogConfig as Config
from sslx.runs.trackers import Report, TensorBoard, WandB


class Meter:
    """Means of scalar metrics since the last fetch, summed in float64 on the metrics' device."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._weights: dict[tuple[str, ...], float] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add one step's metrics (0-dim tensors on one device) without a host sync.  The values are copied."""
        names = tuple(metrics)
        if not names:
            return
        values = torch.stack([value.detach() for value in metrics.values()]).double()
        assert values.ndim == 1, "metrics are 0-dim tensors"
        if names in self._sums:
            self._sums[names].add_(values, alpha=weight)
        else:
            self._sums[names] = values * weight
        self._weights[names] = self._weights.get(names, 0.0) + weight

    def fetch(
        self, reduce: Callable[[Tensor], Tensor] | None = None, beside: Tensor | None = None
    ) -> tuple[dict[str, float], list[float]]:
        """Return the weighted means and the numbers in ``beside``, then start afresh.

        This is the only host sync: one transfer.

        reduce: applied to the float64 vector of all sums and weights before it leaves the device, such as
          ``distributed.mean_over_ranks``.  Every rank must then fetch, and must have added the same metrics.
        beside: float64 numbers (M,) of this rank on the same device, to be fetched in the same transfer.
        """
        if not self._sums:
            return {}, [] if beside is None else beside.tolist()
        sums = torch.cat(list(self._sums.values()))
        vector = torch.cat([sums, sums.new_tensor(list(self._weights.values()))])
        vector = reduce(vector) if reduce else vector
        values: list[float] = (vector if beside is None else torch.cat([vector, beside])).tolist()  # sync point
        numbers, beside_values = values[: len(vector)], values[len(vector) :]
        names = [(name, group) for group, names in enumerate(self._sums) for name in names]
        totals: dict[str, tuple[float, float]] = {}
        for (name, group), number in zip(names, numbers, strict=False):
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = total + number, weight + numbers[len(names) + group]
        self._sums, self._weights = {}, {}
        return {name: total / weight for name, (total, weight) in totals.items()}, beside_values


class JSONL:
    """``metrics.jsonl``: one JSON object per line, {"step", "time" (Unix, s), metrics}.  Non-finite values are null.

    Lines after ``start_step``, left by an interrupted run, and an unfinished last line are removed first, so that
    each step is there once.
    """

    def __init__(self, path: Path, start_step: int, report: Report) -> None:
        self._report, self._has_failed = report, False
        if path.is_fifo():
            raise StorageError(f"cannot write {shown(path)}: it is a named pipe, and opening it would block: delete it")
        if path.exists():
            text = path.read_bytes()
            kept = b"".join(line for line in text.splitlines(keepends=True) if _is_up_to(line, start_step))
            if kept != text:
                files.replace(path, kept)
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        except OSError as error:  # the file object keeps the line and tries again with the next one
            if not self._has_failed:
                self._report(f"cannot write metrics.jsonl: {error.strerror}: training continues without it")
            self._has_failed = True

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _is_up_to(line: bytes, step: int) -> bool:
    metrics = records.parse_metrics(line)
    return metrics is not None and metrics["step"] <= step


class Log:
    """All log outputs of a run.  Only the main rank (``enabled``) logs; on the others, every call does nothing.

    folder: the run folder, which must exist.  start_step: the step to resume at, 0 for a new run.
    run_id: from trackers.run_id().  run_config: settings to show in wandb.
    Raise StorageError if metrics.jsonl cannot be opened.  A later write error is reported once and training continues.
    As a context manager, the log closes what it has opened, even after an exception, but not the terminal.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        enabled: bool,
        terminal: Terminal,
        total_steps: int,
        start_step: int,
        run_id: str,
        run_config: dict[str, Any],
    ) -> None:
        self._terminal = terminal if enabled else Terminal(enabled=False)
        self._jsonl: JSONL | None = None
        self._trackers = list[WandB | TensorBoard]()
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        try:
            self._jsonl = JSONL(path, start_step, self.message)
        except OSError as error:
            raise StorageError(f"cannot write {shown(path)}: {error.strerror}: free or mount the disk") from error
        terminal.begin(total_steps, start_step)
        if config.wandb != "off":
            with activity.doing("connecting to wandb"):
                self._trackers.append(WandB(config, folder, run_id, run_config, self.message))
        if config.tensorboard:
            self._trackers.append(TensorBoard(folder, self.message))

    def advance(self, step: int) -> None:
        """Show that a step is done.  Called after each step, whether or not its metrics are fetched."""
        self._terminal.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers on the host, from ``Meter.fetch``, to every output."""
        for sink in (self._terminal, self._jsonl, *self._trackers):
            if sink is not None:
                sink.log(step, metrics)

    def message(self, text: str) -> None:
        """Print a line, above the live display if there is one."""
        self._terminal.message(text)

    def close(self, exit_code: int = 0) -> None:
        """Flush and close metrics.jsonl and the trackers; a nonzero exit_code marks wandb's run as failed.

        A second call has no effect.
        """
        for tracker in self._trackers:
            with activity.doing(f"sending the rest to {tracker.name}"):
                tracker.close(exit_code)
        if self._jsonl is not None:
            self._jsonl.close()
        self._jsonl, self._trackers = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)
