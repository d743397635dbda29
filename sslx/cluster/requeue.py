"""Whether a batch script whose step has ended requeues the job or ends it: ``python -m sslx.cluster.requeue``.

A run that was stopped and saved, or that crashed, starts again from its newest checkpoint.  One that cannot go on by
itself (a wrong flag, missing images, a loss that is no number) does not, nor one that three starts have not taken any
further.  The batch script asks, not a rank: it outlives a killed or hung rank, and a requeue cannot end it midway.
Imports nothing heavy.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sslx.console import streams
from sslx.console.words import one_line, shown
from sslx.errors import DataError, UserError
from sslx.machine import files
from sslx.runs import records

Record = TypeVar("Record", records.Status, records.Job)

SAVED, NO_PROGRESS, CANCELLED = 75, 93, 130
FINAL = (0, 64, 65, 66, 74, 76, 77, 130, 141)
"""Exit codes after which a new start would end alike; ``sslx.errors`` lists them."""
MAX_STARTS = 3
"""Starts that may end at the same checkpoint before the job is given up."""


def main(argv: Sequence[str]) -> int:
    """``FOLDER CODE STARTED``: folder of the run, or of an array's jobs with a ``runs.json``; the step's exit code.

    STARTED (Unix, s): an older status.json is not of this start.  SSLX_ENDED_BY_SLURM=1 in the environment: Slurm told
    the batch script too to end (scancel, the time limit, its own requeue), so what comes next is Slurm's to say.
    Returns the exit code of the job.
    """
    folder, code = run_folder(Path(argv[0])), int(argv[1])
    status = _readable(records.read_status, folder)
    if status and status.state != "running" and status.time >= float(argv[2]):
        code = 0 if status.state == "done" else status.code or code  # torchrun and srun have codes of their own
        reason = status.reason
    else:
        reason = f"exit code {code}"
    cancelled = folder / "cancel"
    if cancelled.exists():
        cancelled.unlink(missing_ok=True)
        reason = "sslx cancel"
    if code == 0:
        return 0
    job = job_id()
    step = records.newest_step(folder)
    records.add_stop(folder, records.Stop(time=round(time.time(), 3), job=job, code=code, step=step, reason=reason))
    if reason == "sslx cancel":
        return CANCELLED
    if os.environ.get("SSLX_ENDED_BY_SLURM") == "1" or code in FINAL:
        return code
    submitted = _readable(records.read_job, folder)
    if not moves(records.read_stops(folder), submitted.submitted if submitted else 0.0):
        why = f"{MAX_STARTS} starts ended at step {step:,}, the last with: {reason}"
        records.write_status(folder, "failed", step, why, NO_PROGRESS)
        sys.stderr.write(f"error: {one_line(why)}: not started again\n")
        return NO_PROGRESS
    sys.stderr.write(f"{one_line(reason)}: requeueing, to go on at step {step:,}\n")
    return requeue(job) if "SLURM_JOB_ID" in os.environ else SAVED


def moves(stops: Sequence[records.Stop], since: float) -> bool:
    """Whether the last MAX_STARTS starts have brought at least one new checkpoint.

    since: when the job was submitted (Unix, s): the starts of earlier jobs do not count.
    """
    earlier = [stop for stop in stops if stop.time < since]
    own = stops[len(earlier) :]
    before = [*earlier, *own[:-MAX_STARTS]]
    return len(own) < MAX_STARTS or own[-1].step > (before[-1].step if before else 0)


def job_id() -> str:
    """Slurm's of this job, of an array's task as 123_4; this process's number without Slurm.

    One task of every array has the whole array's number as its own: to requeue that would requeue all of them.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", str(os.getpid()))


def requeue(job: str) -> int:
    """``scontrol requeue``; 75 also where Slurm was first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the requeue's own, which else may end scontrol: inherited by it
    done = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        sys.stderr.write(f"scontrol requeue {job}: {one_line(done.stderr)}\n")
    return SAVED


def run_folder(folder: Path) -> Path:
    """The run of this job: the folder itself, or that of the array's task.  DataError where that cannot be told."""
    runs = folder / "runs.json"
    if not runs.exists():
        return folder
    try:
        names: Any = json.loads(files.read_text(runs, max_bytes=1 << 26))
        return Path(names[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{shown(runs)} does not name the run of this task of the array: submit it again") from error


def _readable(read: Callable[[Path], Record | None], folder: Path) -> Record | None:
    """A record of the run, None also where it is damaged: the exit code says enough."""
    try:
        return read(folder)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return None


def end(argv: Sequence[str]) -> NoReturn:
    """``main`` as a process of its own."""
    streams.make_safe()
    try:
        sys.exit(main(argv))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    end(sys.argv[1:])
