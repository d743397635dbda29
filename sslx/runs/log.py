"""Metrics and logging: metrics averaged on the device, then written to the display, metrics.jsonl and wandb.

``metrics.jsonl`` in the run folder is the complete record; the display and wandb show its contents.
"""

import json
import math
import os
import re
import secrets
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

Report = Callable[[str], None]


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


class WandB:
    """A wandb run that remains one run across restarts, is complete after each, and never stops the training.

    A kill loses what wandb had not yet written (offline, in blocks of 32 KiB), so a restart sends ``metrics.jsonl``
    again.  wandb's own step is set too, so that wandb drops the steps that it already has.
    """

    def __init__(self, config: Config, folder: Path, run_id: str, run_config: dict[str, Any], report: Report) -> None:
        self._run, self._report = None, report
        # At exit, wandb's own error reporting waits half a minute for a silent server, whatever the timeouts are.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            timeout_s = config.wandb_timeout_s
            timeouts: dict[str, Any] = {
                "init_timeout": timeout_s,
                "login_timeout": timeout_s,
                "finish_timeout": timeout_s,
            }
            settings = wandb.Settings(silent=True, quiet=True, console="off", **timeouts)
            wandb.setup(settings)
            options: dict[str, Any] = {"project": config.project, "name": shown(folder.absolute().name), "id": run_id}
            options |= {"resume": "allow", "dir": folder, "config": run_config, "settings": settings}
            try:
                self._run = wandb.init(**options, mode="offline" if config.wandb == "offline" else "online")
            except Exception as error:
                if config.wandb == "offline":
                    raise
                wandb.teardown()  # otherwise the id counts as in use
                self._run = wandb.init(**options, mode="offline")
                command = f"wandb sync {Path(self._run.dir).parent}"
                report(f"wandb: {_first_line(error)}: logging offline; send the logs later with `{command}`")
            self._run.define_metric("*", step_metric="step")
            for metrics in records.read_metrics(folder / "metrics.jsonl"):
                step, time_s = int(metrics.pop("step")), metrics.pop("time", math.nan)
                self.log(step, metrics | ({"_timestamp": time_s} if math.isfinite(time_s) else {}))
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log({"step": step, **metrics}, step=step)
            except Exception as error:
                self._give_up(error)

    def close(self, exit_code: int = 0) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._report(f"wandb: {_first_line(error)}: no longer logging to wandb; metrics.jsonl has all metrics")


def _first_line(error: Exception) -> str:
    return shown(str(error).partition("\n")[0]) or type(error).__name__


class Log:
    """All log outputs of a run.  Only the main rank (``enabled``) logs; on the others, every call does nothing.

    folder: the run folder, which must exist.  start_step: the step to resume at, 0 for a new run.
    run_id: from new_run_id() or, on a resume, from the checkpoint.  run_config: settings to show in wandb.
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
        self._wandb: WandB | None = None
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
                self._wandb = WandB(config, folder, run_id, run_config, self.message)

    def advance(self, step: int) -> None:
        """Show that a step is done.  Called after each step, whether or not its metrics are fetched."""
        self._terminal.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write numbers on the host, from ``Meter.fetch``, to every output."""
        for sink in (self._terminal, self._jsonl, self._wandb):
            if sink is not None:
                sink.log(step, metrics)

    def message(self, text: str) -> None:
        """Print a line, above the live display if there is one."""
        self._terminal.message(text)

    def close(self, exit_code: int = 0) -> None:
        """Flush and close metrics.jsonl and wandb; a nonzero exit_code marks wandb's run as failed.

        A second call has no effect.
        """
        if self._wandb is not None:
            with activity.doing("sending the rest to wandb"):
                self._wandb.close(exit_code)
        if self._jsonl is not None:
            self._jsonl.close()
        self._jsonl = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(exit_code=0 if kind is None else 1)


def new_run_id() -> str:
    """Return twelve random hex digits.  They are not part of the experiment, so they do not come from ``rng``."""
    return secrets.token_hex(6)


def run_id(folder: Path) -> str:
    """Return the run's id from its folder.  If it is damaged or missing, write a new one."""
    path = folder / "run_id"
    with suppress(OSError, ValueError):
        text = files.read_text(path).strip()
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text):
            return text
    new_id = new_run_id()
    with suppress(OSError):
        files.replace(path, new_id.encode())
    return new_id
