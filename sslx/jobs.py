"""``sslx jobs``, ``sslx logs`` and ``sslx cancel``: how runs stand, from their folders and Slurm's queue.

Imports nothing heavy, needs no ``sacct``, and also shows runs that no cluster started.
"""

import argparse
import getpass
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from sslx import outcome, requeue
from sslx.errors import ConfigError, MissingInput

Queue: TypeAlias = "dict[str, tuple[str, str]]"
"""(state, why it waits) of the jobs that Slurm has not ended, by id."""
_STATES = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "COMPLETING": "ending",
    "REQUEUE_HOLD": "held",
    "STOPPED": "held",
}


def main(argv: Sequence[str]) -> int:
    """A table of all runs under a folder."""
    parser = argparse.ArgumentParser(prog="sslx jobs", description="How every run under a folder stands.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="a run, or a folder of runs (runs)")
    folder: Path = parser.parse_args(argv).folder
    if not folder.is_dir():
        raise MissingInput(f"no folder {folder}: give that of your runs, as: sslx jobs runs")
    runs = sorted(path for path in (folder, *folder.glob("*"), *folder.glob("*/*")) if is_run(path))
    if not runs:
        sys.stdout.write(f"no runs in {folder}\n")
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "job", "state", "step", "samples/s", "checkpoint", "starts", "last stop"):
        table.add_column(column, justify="right" if column in ("step", "samples/s", "starts") else "left")
    queue: Queue = {}
    try:
        queue = queued() if any(is_on_slurm(run) for run in runs) else {}
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
    for run in runs:
        table.add_row(run.relative_to(folder).as_posix() if run != folder else run.name, *row(run, queue))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def is_run(folder: Path) -> bool:
    """Whether a run was started or submitted in this folder."""
    return any((folder / name).is_file() for name in ("config.json", "job.json"))


def is_on_slurm(run: Path) -> bool:
    """Whether its job is one of Slurm's."""
    job = outcome.read_job(run)
    return job is not None and job.cluster == "slurm"


def row(run: Path, queue: Queue) -> list[str]:
    """job, state, step, samples/s, checkpoint, starts and last stop of a run."""
    job, status, stops = outcome.read_job(run), outcome.read_status(run), outcome.read_stops(run)
    metrics = last_metrics(run)
    step = max(status.step if status else 0, int(metrics.get("step", 0)))
    saved = outcome.newest_step(run)
    age = ""
    with suppress(OSError):
        age = f", {_ago(time.time() - (run / 'checkpoints' / f'step_{saved}').stat().st_mtime)}"
    speed = metrics.get("samples_per_s")
    last = stops[-1].reason if stops else (status.reason if status and status.state != "running" else "")
    return [
        f"{job.id} ({job.cluster})" if job else "-",
        state(job, status, queue),
        f"{step:,}",
        f"{speed:,.0f}" if speed is not None else "-",
        f"step {saved:,}{age}" if saved else "none",
        str(len(stops) + 1 if status else 0),
        last or "-",
    ]


def state(job: outcome.Job | None, status: outcome.Status | None, queue: Queue) -> str:
    """What a run is doing, in a word or two: Slurm's state while the job is in its queue, else that of its end."""
    if job and (found := live(job, queue)):
        return found
    if status is None:
        return "lost: the job ended before it began" if job else "starting"
    if status.state == "running" and job:
        return "lost: no job is running it"
    return f"{status.state} ({status.code})" if status.state == "failed" else status.state


def queued() -> Queue:
    """All one's own jobs; none without Slurm.  ConfigError where Slurm does not answer."""
    if not shutil.which("squeue"):
        return {}
    asked = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T|%r"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"Slurm does not answer: {_one_line(done.stderr)}")
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def live(job: outcome.Job, queue: Queue) -> str:
    """What the job is doing if it has not ended, else ""."""
    if job.cluster == "slurm":
        found, why = queue.get(job.id, ("", ""))
        word = _STATES.get(found, found.lower())
        return f"{word} ({why})" if found == "PENDING" else word
    try:
        return "running" if b"submitit" in Path(f"/proc/{job.id}/cmdline").read_bytes() else ""
    except OSError:
        return ""


def now(job: outcome.Job) -> str:
    """``live``, asking Slurm where it is Slurm's."""
    return live(job, queued() if job.cluster == "slurm" else {})


def last_metrics(run: Path) -> dict[str, float]:
    """The last whole line of metrics.jsonl, {} without one."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    whole = [line for line in lines if line.endswith(b"\n")]
    with suppress(ValueError, IndexError):
        return json.loads(whole[-1])
    return {}


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def logs_main(argv: Sequence[str]) -> int:
    """The last lines that a run's job has printed, and those to come."""
    parser = argparse.ArgumentParser(prog="sslx logs", description="What the job of a run has printed.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as it prints more, until Ctrl-C")
    parser.add_argument("-n", "--lines", type=int, default=50, help="lines to show first (50)")
    wanted = parser.parse_args(argv)
    job = _job(wanted.run)
    if not Path(job.log).exists():
        doing = _now_or("nobody knows, Slurm does not answer", job) or "it has ended"
        sys.stderr.write(f"job {job.id} has printed nothing yet: {doing}\n")
        if not wanted.follow:
            return 0
    sys.stdout.flush()
    follow = ["-F"] if wanted.follow else []
    return subprocess.run(["tail", "-q", "-n", str(wanted.lines), *follow, job.log], check=False).returncode


def claim(folder: Path, code: str) -> str:
    """Make this batch job the run's owner, as slurm/pretrain.sbatch does before it starts anything.

    code: of sslx, as it is now; returns a note for the log where the job was begun with another one, else "".  Raises
    ConfigError where another job that has not ended owns the run.
    """
    job, owner = requeue.job_id(), outcome.read_job(folder)
    if owner and owner.id == job:
        return f"note: the code has changed since the job began: {owner.code} -> {code}\n" if owner.code != code else ""
    if owner and (state := now(owner)):
        raise ConfigError(f"run {folder} belongs to job {owner.id}, which is {state}: take another NAME, or cancel it")
    log = ""
    if shutil.which("scontrol"):
        asked = ["scontrol", "show", "job", job]
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        log = next((word.removeprefix("StdOut=") for word in lines if word.startswith("StdOut=")), "")
    folder.mkdir(parents=True, exist_ok=True)
    outcome.write_job(folder, outcome.Job(cluster="slurm", id=job, log=log, code=code, submitted=time.time()))
    return ""


def cancel_main(argv: Sequence[str]) -> int:
    """Have a run save a checkpoint and end, without being requeued."""
    parser = argparse.ArgumentParser(prog="sslx cancel", description="Save a checkpoint of a run and end its job.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--wait-s", type=float, default=120.0, help="seconds to wait for the checkpoint (120)")
    wanted = parser.parse_args(argv)
    run: Path = wanted.run
    job = _job(run)
    before = now(job)
    if not before:
        raise ConfigError(f"job {job.id} of {run} has ended already")
    (run / "cancel").touch()  # what the batch script reads: do not requeue
    try:
        if before != "running":
            return _end(job, run, f"cancelled job {job.id}, which was {before}")
        _signal(job)
    except (subprocess.CalledProcessError, OSError) as error:
        (run / "cancel").unlink(missing_ok=True)
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ConfigError(f"job {job.id} cannot be ended: {_one_line(why)}") from error
    sys.stderr.write(f"asked job {job.id} to save and end\n")
    deadline = time.monotonic() + wanted.wait_s
    while found := _now_or(before, job):
        if found != before:
            sys.stderr.write(f"job {job.id}: {found}\n")
            before = found
        if time.monotonic() > deadline:
            return _end(job, run, f"job {job.id} did not end in {wanted.wait_s:g} s: ended it without a new checkpoint")
        time.sleep(0.5)
    sys.stdout.write(f"job {job.id} ended; {run} can go on at step {outcome.newest_step(run):,} with --resume auto\n")
    return 0


def _now_or(before: str, job: outcome.Job) -> str:
    """``now``, or what was last seen where Slurm does not answer."""
    try:
        return now(job)
    except ConfigError:
        return before


def _scancel(*arguments: str) -> None:
    subprocess.run(["scancel", *arguments], check=True, capture_output=True, text=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _signal(job: outcome.Job) -> None:
    if job.cluster == "slurm":
        _scancel("--signal", "USR2", job.id)
    else:
        os.kill(int(job.id), signal.SIGTERM)  # submitit's controller hands it on


def _end(job: outcome.Job, run: Path, words: str) -> int:
    if job.cluster == "slurm":
        _scancel(job.id)
    else:
        os.kill(int(job.id), signal.SIGINT)  # it ends its tasks
    (run / "cancel").unlink(missing_ok=True)
    sys.stdout.write(words + "\n")
    return 0


def _job(run: Path) -> outcome.Job:
    if not run.is_dir():
        raise MissingInput(f"no run folder {run}: sslx jobs lists those there are")
    job = outcome.read_job(run)
    if job is None:
        raise MissingInput(f"{run} was not submitted as a job: its lines are in {run / 'metrics.jsonl'}")
    return job
