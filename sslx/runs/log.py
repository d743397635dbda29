"""What a run tells: metrics averaged on the device, and the sinks: the display, metrics.jsonl, wandb.

``metrics.jsonl`` in the run folder is the truth; the display and wandb are views of it.
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

Tell = Callable[[str], None]


class Meter:
    """Means of scalar metrics since the last fetch, summed in float64 on the device that they are on."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._weights: dict[tuple[str, ...], float] = {}

    def add(self, metrics: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add one step's metrics, 0-dim tensors on one device, without a host sync; copies what it keeps."""
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
        """(the weighted means, what ``beside`` holds), and a fresh start.  A host sync, the only one: one transfer.

        reduce: applied to the float64 vector of all sums and weights before it leaves the device, such as
          ``distributed.mean_over_ranks``; every rank must then fetch, having added the same metrics.
        beside: any numbers on the same device, float64 (M,), that are to be read with them, of this rank alone.
        """
        if not self._sums:
            return {}, [] if beside is None else beside.tolist()
        sums = torch.cat(list(self._sums.values()))
        vector = torch.cat([sums, sums.new_tensor(list(self._weights.values()))])
        vector = reduce(vector) if reduce else vector
        read: list[float] = (vector if beside is None else torch.cat([vector, beside])).tolist()  # sync point
        numbers, others = read[: len(vector)], read[len(vector) :]
        names = [(name, group) for group, names in enumerate(self._sums) for name in names]
        totals: dict[str, tuple[float, float]] = {}
        for (name, group), number in zip(names, numbers, strict=False):
            total, weight = totals.get(name, (0.0, 0.0))
            totals[name] = total + number, weight + numbers[len(names) + group]
        self._sums, self._weights = {}, {}
        return {name: total / weight for name, (total, weight) in totals.items()}, others


class JSONL:
    """``metrics.jsonl``: a line of JSON each time, {"step", "time" (Unix, s), metrics}; not finite is null.

    What an interrupted run wrote after ``start_step``, and a line that it did not finish, is cut away first:
    so each step stands once.
    """

    def __init__(self, path: Path, start_step: int, tell: Tell) -> None:
        self._tell, self._told = tell, False
        if path.is_fifo():
            raise StorageError(f"cannot write {shown(path)}: it is a named pipe, which would wait for its reader")
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
            if not self._told:
                self._tell(f"cannot write metrics.jsonl: {error.strerror}: training goes on without lines")
            self._told = True

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def _is_up_to(line: bytes, step: int) -> bool:
    metrics = records.metrics_of(line)
    return metrics is not None and metrics["step"] <= step


class WandB:
    """A wandb run that stays one run over restarts, is complete after each, and never stops the training.

    A kill loses what wandb had not yet written (offline: blocks of 32 KiB), so a restart sends
    ``metrics.jsonl`` again.  The step is wandb's own too: it drops those it has, and none goes back.
    """

    def __init__(self, config: Config, folder: Path, run_id: str, run_config: dict[str, Any], tell: Tell) -> None:
        self._run, self._tell = None, tell
        # wandb's own error reporting waits half a minute for a silent server at exit, whatever the timeouts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            limit = config.wandb_timeout_s
            limits: dict[str, Any] = {"init_timeout": limit, "login_timeout": limit, "finish_timeout": limit}
            settings = wandb.Settings(silent=True, quiet=True, console="off", **limits)
            wandb.setup(settings)
            given: dict[str, Any] = {"project": config.project, "name": shown(folder.absolute().name), "id": run_id}
            given |= {"resume": "allow", "dir": folder, "config": run_config, "settings": settings}
            try:
                self._run = wandb.init(**given, mode="offline" if config.wandb == "offline" else "online")
            except Exception as error:
                if config.wandb == "offline":
                    raise
                wandb.teardown()  # or the id counts as in use
                self._run = wandb.init(**given, mode="offline")
                sync = f"`wandb sync {Path(self._run.dir).parent}`"
                tell(f"wandb: {_first_line(error)}: logging offline, {sync} sends it later")
            self._run.define_metric("*", step_metric="step")
            for past in records.read_metrics(folder / "metrics.jsonl"):
                step, time_s = int(past.pop("step")), past.pop("time", math.nan)
                self.log(step, past | ({"_timestamp": time_s} if math.isfinite(time_s) else {}))
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
        self._tell(f"wandb: {_first_line(error)}: no longer logging to it; metrics.jsonl has it all")


def _first_line(error: Exception) -> str:
    return shown(str(error).partition("\n")[0]) or type(error).__name__


class Log:
    """All sinks of a run.  On the main rank (enabled) only; elsewhere every call does nothing.

    folder: the run folder, there already.  start_step: the step resumed at, 0 for a new run.
    run_id: from new_run_id() or, on a resume, from the checkpoint.  run_config: for wandb.
    StorageError where metrics.jsonl cannot be opened; later failures to write are told once and go on.
    As a context manager it closes what it has opened, also when an exception passes; the terminal stays.
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
        """Show that this step is done; after each one, whether or not its metrics are fetched."""
        self._terminal.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send host numbers to every sink; fetch them from a Meter first."""
        for sink in (self._terminal, self._jsonl, self._wandb):
            if sink is not None:
                sink.log(step, metrics)

    def message(self, text: str) -> None:
        """Print a line, above the live display where there is one."""
        self._terminal.message(text)

    def close(self, exit_code: int = 0) -> None:
        """Flush and close metrics.jsonl and wandb; twice does no harm.  exit_code: not 0 marks wandb's as failed."""
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
    """Twelve hex digits that no other run has: not part of the experiment, so not from ``rng``."""
    return secrets.token_hex(6)


def run_id(folder: Path) -> str:
    """The run's id in its folder; another one, which is written there, where it is damaged or gone."""
    path = folder / "run_id"
    with suppress(OSError, ValueError):
        text = files.read_text(path).strip()
        if re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text):
            return text
    another = new_run_id()
    with suppress(OSError):
        files.replace(path, another.encode())
    return another
