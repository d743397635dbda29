"""``sslx jobs``, ``sslx logs`` and ``sslx cancel``: the states of runs, from their folders and Slurm's queue.

This module imports nothing heavy, does not need ``sacct``, and also shows runs that were not submitted as jobs.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sslx.cluster import requeue
from sslx.console.words import one_line, shown
from sslx.errors import ConfigError, DataError, MissingInput, StorageError
from sslx.machine import files, proc
from sslx.runs import lock as locks
from sslx.runs import records

Queue: TypeAlias = "dict[str, tuple[str, str]]"
"""(state, reason for waiting) of each job that Slurm has not ended, by job id."""
_COLUMNS = ["run", "job", "state", "step", "samples/s", "checkpoint", "starts", "last stop"]
_NUMERIC_COLUMNS = ("step", "samples/s", "starts")
SLURM_TIMEOUT_S = 100.0
"""Time limit for one Slurm command; Slurm itself waits 10 s for most messages and retries a few times."""
_PROCESS_GONE = "dead: its process is gone"
_STATE_WORDS = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "REQUEUE_HOLD": "held",
    "STOPPED": "held",
}


def show(folder: Path) -> int:
    """Print a table of all runs under a folder and return the exit code."""
    if not os.path.isdir(folder):
        raise MissingInput(f"folder {shown(folder)} does not exist: pass the one that holds your runs")
    runs = sorted(path for path in (folder, *folder.glob("*"), *folder.glob("*/*")) if is_run(path))
    if not runs:
        sys.stdout.write(f"no runs in {shown(folder)}\n")
        return 0
    queue: Queue = {}
    try:
        queue = read_queue() if any(is_on_slurm(run) for run in runs) else {}
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
    names = [run.relative_to(folder).as_posix() if run != folder else run.name for run in runs]
    rows = [[name, *_row_or_damage(run, queue)] for name, run in zip(names, runs, strict=True)]
    rows = [[shown(cell, 200) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_on_terminal(rows, Console())
    else:
        _print_table(rows, Console(width=160))
    return 0


def _print_table(rows: list[list[str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMERIC_COLUMNS else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_on_terminal(rows: list[list[str]], console: Console) -> None:
    """Print a table if it fits, or else narrower rows with the reason for a failure on a line below."""
    shown_columns = [i for i, column in enumerate(_COLUMNS) if column != "job" or any(row[i] != "-" for row in rows)]
    widths = [max(cell_len(row[i]) for row in (_COLUMNS, *rows)) for i in range(len(_COLUMNS))]
    if sum(widths) + 2 * len(widths) <= console.width:
        return _print_table(rows, console)
    rows = [[*row[:2], *row[2].partition(": ")[::2], *row[3:]] for row in rows]  # split the state from its reason
    shown_columns = [i + (i > 2) for i in shown_columns if i < len(_COLUMNS) - 1]
    columns = [*_COLUMNS[:3], "", *_COLUMNS[3:]]
    widths = [max(cell_len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    other_columns = sum(widths[i] + 2 for i in shown_columns[1:])
    widths[0] = max(cell_len("run"), min(widths[0], console.width - other_columns))
    for row in (columns, *rows):
        name, *cells = [_padded(row[i], widths[i], right=columns[i] in _NUMERIC_COLUMNS) for i in shown_columns]
        if cell_len(name) > widths[0]:  # a long name gets its own line
            console.print(Text(name), soft_wrap=True)
            name = " " * widths[0]
        console.print(Text("  ".join([name, *cells]).rstrip(), style="bold" if row is columns else ""), soft_wrap=True)
        reasons = "; ".join(cell for cell in (row[3], row[-1]) if cell not in ("", "-"))
        if reasons and row is not columns:
            console.print(Padding(Text(reasons, style="dim"), (0, 0, 0, 2)))
    return None


def _padded(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def is_run(folder: Path) -> bool:
    """Return whether a run was started or submitted in this folder."""
    return any(os.path.isfile(folder / name) for name in ("config.json", "job.json"))


def is_on_slurm(run: Path) -> bool:
    """Return whether the run has a readable record of a Slurm job."""
    try:
        job = records.read_job(run)
    except DataError:
        return False
    return job is not None and job.cluster == "slurm"


def _row_or_damage(run: Path, queue: Queue) -> list[str]:
    """Return the run's row, or one that names the damaged record, so that the other runs are still listed."""
    try:
        return table_row(run, queue)
    except (DataError, OSError) as error:
        return ["-", "damaged", "-", "-", "-", "-", files.reason(error).removeprefix(f"{shown(run)}/")]


def table_row(run: Path, queue: Queue) -> list[str]:
    """Return the job, state, step, samples/s, checkpoint, starts and last stop of a run."""
    job, status, stops = records.read_job(run), records.read_status(run), records.read_stops(run)
    metrics = records.last_metrics(run / "metrics.jsonl")
    step = max(status.step if status else 0, int(metrics.get("step", 0)))
    saved_step = records.newest_step(run)
    age = ""
    with suppress(OSError):
        age = f", {_ago(time.time() - (run / 'checkpoints' / f'step_{saved_step}').stat().st_mtime)}"
    speed = metrics.get("samples_per_s", math.nan)
    owner = locks.read_owner(run)
    if owner:
        is_owned = owner[1]
    else:
        is_owned = False if status else None
    state = run_state(job, status, queue, is_owned=is_owned)
    last = stops[-1].reason if stops else (status.reason if status and status.state != "running" else "")
    if owner and not owner[1] and state == _PROCESS_GONE:
        last = str(owner[0])
    return [
        f"{job.id} ({job.cluster})" if job else "-",
        state,
        f"{step:,}",
        f"{speed:,.0f}" if math.isfinite(speed) else "-",
        f"step {saved_step:,}{age}" if saved_step else "none",
        str(len(stops) + 1 if status else 0),
        "Ctrl-C" if last == "SIGINT" else one_line(last) or "-",
    ]


def run_state(
    job: records.Job | None, status: records.Status | None, queue: Queue, *, is_owned: bool | None = None
) -> str:
    """Describe what a run is doing: the state of its job while that is queued or running, else how the run ended.

    is_owned: whether a living process owns the run folder, or None if that is unknown or the run has no status yet.
    """
    if job and (state := job_state(job, queue)):
        return state
    if status is None:
        if job:
            return "dead: the job ended before it began"
        return _PROCESS_GONE if is_owned is False else "starting"
    if status.state == "running" and job and not is_owned:
        return "dead: no job is running it"
    if status.state == "running" and is_owned is False:
        return _PROCESS_GONE
    return f"{status.state} ({status.code})" if status.state == "failed" else status.state


def read_queue() -> Queue:
    """Return the user's jobs in Slurm's queue (none without Slurm).  Raise ConfigError if Slurm does not answer."""
    if not shutil.which("squeue"):
        return {}
    done = _run_slurm("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i|%T|%r")
    if done.returncode:
        raise ConfigError(f"Slurm does not answer: {one_line(done.stderr)}")
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def job_state(job: records.Job, queue: Queue) -> str:
    """Describe what a job is doing, or return "" if it has ended."""
    if job.cluster == "slurm":
        state, reason = queue.get(job.id, ("", ""))
        word = _STATE_WORDS.get(state, state.lower())
        return f"{word} ({reason})" if state == "PENDING" else word
    command = proc.command(job.id)
    if command is not None:
        return "running" if b"submitit" in command else ""
    return "" if proc.exists() or not _process_exists(job.id) else "running"


def _process_exists(pid: str) -> bool:
    """Return whether a process with this id exists, whatever it runs."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def current_job_state(job: records.Job) -> str:
    """Return ``job_state``, with Slurm's queue as it is now."""
    return job_state(job, read_queue() if job.cluster == "slurm" else {})


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def show_log(run: Path, lines: int, follow: bool) -> int:
    """Print the last lines of a run's log and, if ``follow``, the lines to come.  Return the exit code."""
    job = _read_job(run)
    if not os.path.isfile(job.log):
        state = _current_state_or("in an unknown state, as Slurm does not answer", job)
        problem = f"it is {state}" if state else "it has ended"
        sys.stderr.write(f"job {job.id} has printed nothing yet: {problem}\n")
        if not follow:
            return 0
    if lines < 0:
        raise ConfigError(f"--lines must be at least 0, not {lines}")
    sys.stdout.flush()
    command = ["tail", "-q", "-n", str(lines), *(["-F"] if follow else []), "--", job.log]
    return subprocess.run(command, check=False).returncode


def claim(folder: Path, code: str) -> str:
    """Make this batch job the run's owner.  ``slurm/pretrain.sbatch`` does so before it starts anything.

    code: the current ``code_version()``.  Return a note for the log if the job began with another version, else "".
    Raise ConfigError if another job that has not ended owns the run.
    """
    job, owner = requeue.job_id(), records.read_job(folder)
    if owner and owner.id == job:
        return f"note: the code has changed since the job began: {owner.code} -> {code}\n" if owner.code != code else ""
    if owner and (state := current_job_state(owner)):
        raise ConfigError(
            f"run {shown(folder)} belongs to job {owner.id}, which is {state}: choose another NAME, or cancel that job"
        )
    log = ""
    if shutil.which("scontrol"):
        lines = _run_slurm("scontrol", "show", "job", job).stdout.split()
        log = next((word.removeprefix("StdOut=") for word in lines if word.startswith("StdOut=")), "")
    folder.mkdir(parents=True, exist_ok=True)
    records.write_job(folder, records.Job(cluster="slurm", id=job, log=log, code=code, submitted=time.time()))
    return ""


def cancel(run: Path, wait_s: float) -> int:
    """Make a run save a checkpoint and end without being requeued.  Return the exit code."""
    if not 0 <= wait_s < math.inf:
        raise ConfigError(f"--wait-s must be a finite number of seconds, at least 0, not {wait_s}")
    job = _read_job(run)
    state = current_job_state(job)
    if not state:
        raise ConfigError(f"job {job.id} of {shown(run)} has already ended")
    try:
        (run / "cancel").touch()  # tells the batch script not to requeue
    except OSError as error:
        raise StorageError(f"cannot write {shown(run / 'cancel')}: {files.reason(error)}") from error
    try:
        if state != "running":
            return _end(job, run, f"canceled job {job.id}, which was {state}")
        _signal(job)
    except (subprocess.CalledProcessError, OSError) as error:
        (run / "cancel").unlink(missing_ok=True)
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(f"cannot end job {job.id}: {one_line(reason)}") from error
    sys.stderr.write(f"asked job {job.id} to save and end\n")
    deadline = time.monotonic() + wait_s
    while new_state := _current_state_or(state, job):
        if new_state != state:
            sys.stderr.write(f"job {job.id}: {new_state}\n")
            state = new_state
        if time.monotonic() > deadline:
            return _end(job, run, f"job {job.id} did not end in {wait_s:g} s: ended it without a new checkpoint")
        time.sleep(0.5)
    step = records.newest_step(run)
    sys.stdout.write(f"job {job.id} ended; continue {shown(run)} from step {step:,} with --resume auto\n")
    return 0


def _current_state_or(fallback: str, job: records.Job) -> str:
    """Return ``current_job_state``, or ``fallback`` if Slurm does not answer."""
    try:
        return current_job_state(job)
    except ConfigError:
        return fallback


def _scancel(*arguments: str) -> None:
    _run_slurm("scancel", *arguments).check_returncode()


def _run_slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command.  Raise ConfigError if it takes longer than SLURM_TIMEOUT_S."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=SLURM_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"Slurm does not answer: {command[0]} took more than {SLURM_TIMEOUT_S:g} s") from error


def _signal(job: records.Job) -> None:
    if job.cluster == "slurm":
        _scancel("--signal", "USR2", job.id)
    else:
        os.kill(int(job.id), signal.SIGTERM)  # submitit's controller passes it on


def _end(job: records.Job, run: Path, message: str) -> int:
    if job.cluster == "slurm":
        _scancel(job.id)
    else:
        os.kill(int(job.id), signal.SIGINT)  # submitit's controller ends its tasks
    (run / "cancel").unlink(missing_ok=True)
    sys.stdout.write(message + "\n")
    return 0


def _read_job(run: Path) -> records.Job:
    if not os.path.isdir(run):
        raise MissingInput(f"run folder {shown(run)} does not exist: list your runs with sslx jobs")
    job = records.read_job(run)
    if job is None:
        raise MissingInput(f"{shown(run)} was not submitted as a job: see {shown(run / 'metrics.jsonl')}")
    return job
