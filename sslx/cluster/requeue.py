"""Decide whether a batch script requeues or ends a job whose step has ended: ``python -m sslx.cluster.requeue``.

A run that was stopped and saved, or that crashed, starts again from its newest checkpoint.  A run that cannot recover
by itself (a wrong flag, missing images, a NaN loss) does not, and neither does one that made no progress in three
starts.  The batch script decides, not a rank, because the script outlives a killed or hung rank and a requeue cannot
interrupt it midway.  This module imports nothing heavy.
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
"""Exit codes after which another start would end the same way; ``sslx.errors`` lists them."""
MAX_STARTS = 3
"""Number of starts that may end at the same checkpoint before the job is given up."""


def main(argv: Sequence[str]) -> int:
    """Return the exit code of the job, after requeueing it if another start can help.

    argv: ``FOLDER CODE STARTED``, where FOLDER is the run folder, or the folder of a job array with a ``runs.json``;
    CODE is the exit code of the step; and STARTED is when the step began (Unix time, s), so that an older status.json
    is ignored.  SSLX_ENDED_BY_SLURM=1 in the environment means that Slurm told the batch script to end too (scancel,
    the time limit, its own requeue), in which case Slurm decides what comes next.
    """
    folder, code = run_folder(Path(argv[0])), int(argv[1])
    status = _readable(records.read_status, folder)
    if status and status.state != "running" and status.time >= float(argv[2]):
        code = 0 if status.state == "done" else status.code or code  # torchrun and srun return exit codes of their own
        reason = status.reason
    else:
        reason = f"exit code {code}"
    cancel_request = folder / "cancel"
    if cancel_request.exists():
        cancel_request.unlink(missing_ok=True)
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
    job_record = _readable(records.read_job, folder)
    if not has_progressed(records.read_stops(folder), job_record.submitted if job_record else 0.0):
        reason = f"{MAX_STARTS} starts ended at step {step:,}, the last with: {reason}"
        records.write_status(folder, "failed", step, reason, NO_PROGRESS)
        sys.stderr.write(f"error: {one_line(reason)}: not started again\n")
        return NO_PROGRESS
    sys.stderr.write(f"{one_line(reason)}: requeueing to continue from step {step:,}\n")
    return requeue(job) if "SLURM_JOB_ID" in os.environ else SAVED


def has_progressed(stops: Sequence[records.Stop], submitted: float) -> bool:
    """Return whether the last MAX_STARTS starts have produced at least one new checkpoint.

    submitted: when the job was submitted (Unix time, s).  The starts of earlier jobs do not count.
    """
    earlier_jobs = [stop for stop in stops if stop.time < submitted]
    this_job = stops[len(earlier_jobs) :]
    before = [*earlier_jobs, *this_job[:-MAX_STARTS]]
    return len(this_job) < MAX_STARTS or this_job[-1].step > (before[-1].step if before else 0)


def job_id() -> str:
    """Return Slurm's id of this job (123_4 for a task of an array), or the process id without Slurm.

    One task of each array has the id of the whole array in SLURM_JOB_ID: requeueing that would requeue all tasks.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", str(os.getpid()))


def requeue(job: str) -> int:
    """Run ``scontrol requeue`` and return 75, even if Slurm has already requeued the job."""
    # The requeue's SIGTERM might otherwise end scontrol, which inherits this setting.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    done = subprocess.run(
        ["scontrol", "requeue", job], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        sys.stderr.write(f"scontrol requeue {job}: {one_line(done.stderr)}\n")
    return SAVED


def run_folder(folder: Path) -> Path:
    """Return the run folder of this job, looked up in ``runs.json`` for a task of an array.

    Raise DataError if ``runs.json`` does not name it.
    """
    runs = folder / "runs.json"
    if not runs.exists():
        return folder
    try:
        names: Any = json.loads(files.read_text(runs, max_bytes=1 << 26))
        return Path(names[int(os.environ["SLURM_ARRAY_TASK_ID"])])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{shown(runs)} does not name the run of this task of the array: submit the array again"
        ) from error


def _readable(read: Callable[[Path], Record | None], folder: Path) -> Record | None:
    """Read a record of the run.  Print an error and return None if it is damaged: the exit code says enough."""
    try:
        return read(folder)
    except DataError as error:
        sys.stderr.write(f"{error}\n")
        return None


def run_and_exit(argv: Sequence[str]) -> NoReturn:
    """Run ``main`` and end the process with its exit code."""
    streams.make_safe()
    try:
        sys.exit(main(argv))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    run_and_exit(sys.argv[1:])
