"""``sslx jobs``, ``sslx logs`` and ``sslx cancel``: how runs stand, from their folders and Slurm's queue.

Imports nothing heavy, needs no ``sacct``, and also shows runs that no cluster started.
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
"""(state, why it waits) of the jobs that Slurm has not ended, by id."""
_COLUMNS = ["run", "job", "state", "step", "samples/s", "checkpoint", "starts", "last stop"]
_NUMBERS = ("step", "samples/s", "starts")
ASK_S = 100.0
"""How long a command of Slurm's may take; Slurm's own limit for most messages is 10 s, times some retries."""
_GONE = "dead: its process is gone"
_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "REQUEUE_HOLD": "held",
    "STOPPED": "held",
}


def show(folder: Path) -> int:
    """Print a table of all runs under a folder; returns the exit code."""
    if not os.path.isdir(folder):
        raise MissingInput(f"no folder {shown(folder)}: give that of your runs, as: sslx jobs runs")
    runs = sorted(path for path in (folder, *folder.glob("*"), *folder.glob("*/*")) if is_run(path))
    if not runs:
        sys.stdout.write(f"no runs in {shown(folder)}\n")
        return 0
    queue: Queue = {}
    try:
        queue = queued() if any(is_on_slurm(run) for run in runs) else {}
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
    names = [run.relative_to(folder).as_posix() if run != folder else run.name for run in runs]
    rows = [[shown(cell, 200) for cell in (name, *_row(run, queue))] for name, run in zip(names, runs, strict=True)]
    if sys.stdout.isatty():
        _print_on_terminal(rows, Console())
    else:
        _print_table(rows, Console(width=160))
    return 0


def _print_table(rows: list[list[str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_on_terminal(rows: list[list[str]], console: Console) -> None:
    """A table where it fits; where the terminal is too narrow for it, what a run died of stands in lines below it."""
    used = [i for i, column in enumerate(_COLUMNS) if column != "job" or any(row[i] != "-" for row in rows)]
    widths = [max(cell_len(row[i]) for row in (_COLUMNS, *rows)) for i in range(len(_COLUMNS))]
    if sum(widths) + 2 * len(widths) <= console.width:
        return _print_table(rows, console)
    rows = [[*row[:2], *row[2].partition(": ")[::2], *row[3:]] for row in rows]  # the state, and why
    used = [i + (i > 2) for i in used if i < len(_COLUMNS) - 1]
    columns = [*_COLUMNS[:3], "", *_COLUMNS[3:]]
    widths = [max(cell_len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    widths[0] = max(cell_len("run"), min(widths[0], console.width - sum(widths[i] + 2 for i in used[1:])))
    for row in (columns, *rows):
        name, *cells = [_padded(row[i], widths[i], right=columns[i] in _NUMBERS) for i in used]
        if cell_len(name) > widths[0]:  # a long name has a line of its own
            console.print(Text(name), soft_wrap=True)
            name = " " * widths[0]
        console.print(Text("  ".join([name, *cells]).rstrip(), style="bold" if row is columns else ""), soft_wrap=True)
        why = "; ".join(word for word in (row[3], row[-1]) if word not in ("", "-"))
        if why and row is not columns:
            console.print(Padding(Text(why, style="dim"), (0, 0, 0, 2)))
    return None


def _padded(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space


def is_run(folder: Path) -> bool:
    """Whether a run was started or submitted in this folder."""
    return any(os.path.isfile(folder / name) for name in ("config.json", "job.json"))


def is_on_slurm(run: Path) -> bool:
    """Whether its job is one of Slurm's, as far as its record can be read."""
    try:
        job = records.read_job(run)
    except DataError:
        return False
    return job is not None and job.cluster == "slurm"


def _row(run: Path, queue: Queue) -> list[str]:
    """``row``, or what says that this run's records are damaged: the others are listed all the same."""
    try:
        return row(run, queue)
    except (DataError, OSError) as error:
        return ["-", "damaged", "-", "-", "-", "-", files.reason(error).removeprefix(f"{shown(run)}/")]


def row(run: Path, queue: Queue) -> list[str]:
    """job, state, step, samples/s, checkpoint, starts and last stop of a run."""
    job, status, stops = records.read_job(run), records.read_status(run), records.read_stops(run)
    metrics = records.last_metrics(run / "metrics.jsonl")
    step = max(status.step if status else 0, int(metrics.get("step", 0)))
    saved = records.newest_step(run)
    age = ""
    with suppress(OSError):
        age = f", {_ago(time.time() - (run / 'checkpoints' / f'step_{saved}').stat().st_mtime)}"
    speed = metrics.get("samples_per_s", math.nan)
    owner = locks.look(run)
    doing = state(job, status, queue, owned=owner[1] if owner else (False if status else None))
    last = stops[-1].reason if stops else (status.reason if status and status.state != "running" else "")
    if owner and not owner[1] and doing == _GONE:
        last = str(owner[0])
    return [
        f"{job.id} ({job.cluster})" if job else "-",
        doing,
        f"{step:,}",
        f"{speed:,.0f}" if math.isfinite(speed) else "-",
        f"step {saved:,}{age}" if saved else "none",
        str(len(stops) + 1 if status else 0),
        "Ctrl-C" if last == "SIGINT" else one_line(last) or "-",
    ]


def state(job: records.Job | None, status: records.Status | None, queue: Queue, *, owned: bool | None = None) -> str:
    """What a run is doing, in a word or two: Slurm's state while the job is in its queue, else that of its end.

    owned: whether a living process owns the run folder, None where nobody has looked or it has no status yet.
    """
    if job and (found := live(job, queue)):
        return found
    if status is None:
        if job:
            return "dead: the job ended before it began"
        return _GONE if owned is False else "starting"
    if status.state == "running" and job and not owned:
        return "dead: no job is running it"
    if status.state == "running" and owned is False:
        return _GONE
    return f"{status.state} ({status.code})" if status.state == "failed" else status.state


def queued() -> Queue:
    """All one's own jobs; none without Slurm.  ConfigError where Slurm does not answer."""
    if not shutil.which("squeue"):
        return {}
    done = _asked("squeue", "--noheader", "--array", "--user", str(os.getuid()), "--format", "%i|%T|%r")
    if done.returncode:
        raise ConfigError(f"Slurm does not answer: {one_line(done.stderr)}")
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def live(job: records.Job, queue: Queue) -> str:
    """What the job is doing if it has not ended, else ""."""
    if job.cluster == "slurm":
        found, why = queue.get(job.id, ("", ""))
        word = _STATES.get(found, found.lower())
        return f"{word} ({why})" if found == "PENDING" else word
    command = proc.command(job.id)
    if command is not None:
        return "running" if b"submitit" in command else ""
    return "" if proc.exists() or not _lives(job.id) else "running"


def _lives(pid: str) -> bool:
    """Whether there is a process of this number, whatever it does."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def now(job: records.Job) -> str:
    """``live``, asking Slurm where it is Slurm's."""
    return live(job, queued() if job.cluster == "slurm" else {})


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def show_log(run: Path, lines: int, follow: bool) -> int:
    """Print the last lines that a run's job has printed and, to follow it, those to come; returns the exit code."""
    job = _job(run)
    if not os.path.isfile(job.log):
        doing = _now_or("nobody knows, Slurm does not answer", job) or "it has ended"
        sys.stderr.write(f"job {job.id} has printed nothing yet: {doing}\n")
        if not follow:
            return 0
    if lines < 0:
        raise ConfigError(f"--lines must be at least 0, not {lines}")
    sys.stdout.flush()
    command = ["tail", "-q", "-n", str(lines), *(["-F"] if follow else []), "--", job.log]
    return subprocess.run(command, check=False).returncode


def claim(folder: Path, code: str) -> str:
    """Make this batch job the run's owner, as slurm/pretrain.sbatch does before it starts anything.

    code: of sslx, as it is now; returns a note for the log where the job was begun with another one, else "".  Raises
    ConfigError where another job that has not ended owns the run.
    """
    job, owner = requeue.job_id(), records.read_job(folder)
    if owner and owner.id == job:
        return f"note: the code has changed since the job began: {owner.code} -> {code}\n" if owner.code != code else ""
    if owner and (state := now(owner)):
        raise ConfigError(
            f"run {shown(folder)} belongs to job {owner.id}, which is {state}: take another NAME, or cancel it"
        )
    log = ""
    if shutil.which("scontrol"):
        lines = _asked("scontrol", "show", "job", job).stdout.split()
        log = next((word.removeprefix("StdOut=") for word in lines if word.startswith("StdOut=")), "")
    folder.mkdir(parents=True, exist_ok=True)
    records.write_job(folder, records.Job(cluster="slurm", id=job, log=log, code=code, submitted=time.time()))
    return ""


def cancel(run: Path, wait_s: float) -> int:
    """Have a run save a checkpoint and end, without being requeued; returns the exit code."""
    if not 0 <= wait_s < math.inf:
        raise ConfigError(f"--wait-s must be a number of seconds, not {wait_s}")
    job = _job(run)
    before = now(job)
    if not before:
        raise ConfigError(f"job {job.id} of {shown(run)} has ended already")
    try:
        (run / "cancel").touch()  # what the batch script reads: do not requeue
    except OSError as error:
        raise StorageError(f"cannot write {shown(run / 'cancel')}: {files.reason(error)}") from error
    try:
        if before != "running":
            return _end(job, run, f"cancelled job {job.id}, which was {before}")
        _signal(job)
    except (subprocess.CalledProcessError, OSError) as error:
        (run / "cancel").unlink(missing_ok=True)
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(f"job {job.id} cannot be ended: {one_line(why)}") from error
    sys.stderr.write(f"asked job {job.id} to save and end\n")
    deadline = time.monotonic() + wait_s
    while found := _now_or(before, job):
        if found != before:
            sys.stderr.write(f"job {job.id}: {found}\n")
            before = found
        if time.monotonic() > deadline:
            return _end(job, run, f"job {job.id} did not end in {wait_s:g} s: ended it without a new checkpoint")
        time.sleep(0.5)
    sys.stdout.write(
        f"job {job.id} ended; {shown(run)} can go on at step {records.newest_step(run):,} with --resume auto\n"
    )
    return 0


def _now_or(before: str, job: records.Job) -> str:
    """``now``, or what was last seen where Slurm does not answer."""
    try:
        return now(job)
    except ConfigError:
        return before


def _scancel(*arguments: str) -> None:
    _asked("scancel", *arguments).check_returncode()


def _asked(*command: str) -> subprocess.CompletedProcess[str]:
    """What a command of Slurm's has printed.  ConfigError where it takes longer than ASK_S."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=ASK_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"Slurm does not answer: {command[0]} took more than {ASK_S:g} s") from error


def _signal(job: records.Job) -> None:
    if job.cluster == "slurm":
        _scancel("--signal", "USR2", job.id)
    else:
        os.kill(int(job.id), signal.SIGTERM)  # submitit's controller hands it on


def _end(job: records.Job, run: Path, words: str) -> int:
    if job.cluster == "slurm":
        _scancel(job.id)
    else:
        os.kill(int(job.id), signal.SIGINT)  # it ends its tasks
    (run / "cancel").unlink(missing_ok=True)
    sys.stdout.write(words + "\n")
    return 0


def _job(run: Path) -> records.Job:
    if not os.path.isdir(run):
        raise MissingInput(f"no run folder {shown(run)}: sslx jobs lists those there are")
    job = records.read_job(run)
    if job is None:
        raise MissingInput(f"{shown(run)} was not submitted as a job: its lines are in {shown(run / 'metrics.jsonl')}")
    return job
