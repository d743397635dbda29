"""Trackers of experiments, Weights & Biases and TensorBoard, which show what ``metrics.jsonl`` records.

Neither ever stops what uses it: after a failure there is one line, and nothing more is sent.
"""

import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sslx.console.words import shown
from sslx.machine import files
from sslx.runs import records
from sslx.runs.config import LogConfig as Config

Report = Callable[[str], None]
TENSORBOARD = "tensorboard"
"""The folder of event files in a run folder."""


class WandB:
    """A wandb run that remains one run across restarts, is complete after each, and never stops the training.

    A kill loses what wandb had not yet written (offline, in blocks of 32 KiB), so a restart sends ``metrics.jsonl``
    again.  wandb's own step is set too, so that wandb drops the steps that it already has.
    """

    name = "wandb"

    def __init__(self, config: Config, folder: Path, run_id: str, run_config: dict[str, Any], report: Report) -> None:
        self._run, self._report = None, report
        try:
            self._run, problem = _wandb_run(config, folder, run_id, run_config)
            if problem:
                report(f"wandb: {problem}: logging offline; send the logs later with `{_sync_command(self._run)}`")
            self._run.define_metric("*", step_metric="step")
            for step, time_s, metrics in _recorded(folder):
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


class TensorBoard:
    """Event files for TensorBoard in the run folder, whose scalars are those of ``metrics.jsonl``.

    Each start writes a new file: it makes TensorBoard forget the files of earlier starts (``purge_step``), repeats
    ``metrics.jsonl``, and goes on.  So no step is missing after a kill, and none is there twice after a restart.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, report: Report) -> None:
        self._writer, self._report = None, report
        try:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=0)
            for step, time_s, metrics in _recorded(folder):
                self._write(step, metrics, time_s if math.isfinite(time_s) else None)
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            try:
                self._write(step, metrics, None)
                self._writer.flush()
            except Exception as error:
                self._give_up(error)

    def close(self, _: int = 0) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._give_up(error)

    def _write(self, step: int, metrics: Mapping[str, float], time_s: float | None) -> None:
        assert self._writer is not None
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, time_s)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        reason = _first_line(error)
        if isinstance(error, ImportError):
            reason = "the package tensorboard is not installed (pip install tensorboard)"
        self._report(f"TensorBoard: {reason}: no event files are written; metrics.jsonl has all metrics")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of a run after its training.

    step: that of the checkpoint.  values: by name.  tables: heads and rows, by name.  pictures: PNG files, by name.
    """

    step: int
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = field(default_factory=dict[str, Any])
    pictures: Mapping[str, Path] = field(default_factory=dict[str, Path])


def add_results(config: Config, folder: Path, results: Results, report: Report) -> None:
    """Add results to a run's wandb run, and say where they are; do nothing if ``config.wandb`` is off.

    They get a step of wandb's own after the last one of the training; their ``step`` is that of the checkpoint.
    While the run trains nothing is added, because a wandb run takes metrics from one process at a time.
    """
    if config.wandb == "off":
        return
    status = records.read_status(folder)
    if status is not None and status.state == "running":
        report("wandb: status.json says that the run is training: its results are only in the run folder")
        return
    try:
        run, problem = _wandb_run(config, folder, run_id(folder), None)
        import wandb

        own_step = 1 + max((step for step, _, _ in _recorded(folder)), default=results.step)
        entries: dict[str, Any] = {"step": results.step, **results.values}
        for name, (heads, rows) in results.tables.items():
            entries[name] = wandb.Table(columns=list(heads), data=[list(row) for row in rows], allow_mixed_types=True)
        entries |= {name: wandb.Image(str(path)) for name, path in results.pictures.items()}
        run.define_metric("*", step_metric="step")
        run.log(entries, step=max(own_step, int(run.step)))
        place = f"offline; send it with `{_sync_command(run)}`" if run.offline else f"{run.url}"
        run.finish()
        added = ", ".join([*results.tables, *results.pictures])
        report(f"wandb: {problem + ': ' if problem else ''}added {added} to the run, {place}")
    except Exception as error:
        report(f"wandb: {_first_line(error)}: the results are only in the run folder")


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


def _wandb_run(config: Config, folder: Path, run_id: str, run_config: dict[str, Any] | None) -> tuple[Any, str]:
    """Return a new or continued wandb run, and why it is offline although it was to be online, or ""."""
    # At exit, wandb's own error reporting waits half a minute for a silent server, whatever the timeouts are.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    timeout_s = config.wandb_timeout_s
    timeouts: dict[str, Any] = {"init_timeout": timeout_s, "login_timeout": timeout_s, "finish_timeout": timeout_s}
    settings = wandb.Settings(silent=True, quiet=True, console="off", **timeouts)
    wandb.setup(settings)
    options: dict[str, Any] = {"project": config.project, "name": shown(folder.absolute().name), "id": run_id}
    options |= {"resume": "allow", "dir": folder, "config": run_config, "settings": settings}
    try:
        return wandb.init(**options, mode="offline" if config.wandb == "offline" else "online"), ""
    except Exception as error:
        if config.wandb == "offline":
            raise
        wandb.teardown()  # otherwise the id counts as in use
        return wandb.init(**options, mode="offline"), _first_line(error)


def _sync_command(run: Any) -> str:
    return f"wandb sync {shown(Path(run.dir).parent)}"


def _recorded(folder: Path) -> Iterator[tuple[int, float, dict[str, float]]]:
    """Yield the step, the Unix time (NaN without one) and the metrics of each line of ``metrics.jsonl``."""
    for metrics in records.read_metrics(folder / "metrics.jsonl"):
        step, time_s = int(metrics.pop("step")), metrics.pop("time", math.nan)
        yield step, time_s, metrics


def _first_line(error: Exception) -> str:
    return shown(str(error).partition("\n")[0]) or type(error).__name__
