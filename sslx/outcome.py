"""How a run stands, where it runs and how often it stopped: status.json, job.json and stops.jsonl in its folder.

Imports nothing heavy: a batch script and ``sslx jobs`` ask in a tenth of a second.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sslx.errors import DataError, StorageError

State = Literal["running", "done", "preempted", "failed"]


@dataclass(frozen=True)
class Status:
    """How a run stands: what ``status.json`` holds.  time: Unix, in seconds.  code: the exit code of its end."""

    state: State
    step: int
    reason: str
    time: float
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job that a run folder belongs to: what ``job.json`` holds.

    id: Slurm's (123 or 123_4), or the pid of a local one.  code: of sslx when it was submitted, as ``code_version``.
    log: what the job prints, absolute.  submitted: Unix, in seconds.
    """

    cluster: Literal["slurm", "local", "debug"]
    id: str
    log: str
    code: str
    submitted: float


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One end of a job that may start again: a line of ``stops.jsonl``.  step: of the newest checkpoint."""

    time: float
    job: str
    code: int
    step: int
    reason: str


def write_status(folder: Path, state: State, step: int, reason: str = "", code: int = 0) -> None:
    """Replace ``status.json`` in the run folder atomically.  StorageError where that fails."""
    _write(folder / "status.json", Status(state, step, reason, round(time.time(), 3), code))


def read_status(folder: Path) -> Status | None:
    """The status of a run, None where it has none yet.  DataError where the file is not one."""
    path = folder / "status.json"
    try:
        status = Status(**json.loads(path.read_bytes()))
        if status.state not in get_args(State):
            raise ValueError(status.state)
        return status
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no status that sslx wrote: delete it to go on without") from error


def write_job(folder: Path, job: Job) -> None:
    """Say that the run belongs to this job.  StorageError where that fails."""
    _write(folder / "job.json", job)


def read_job(folder: Path) -> Job | None:
    """The job of a run, None where it has none.  DataError where the file is not one."""
    path = folder / "job.json"
    try:
        return Job(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no job that sslx wrote: delete it to go on without") from error


def add_stop(folder: Path, stop: Stop) -> None:
    """Append to ``stops.jsonl``.  StorageError where that fails."""
    path = folder / "stops.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(stop)) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: free or mount the disk") from error


def read_stops(folder: Path) -> list[Stop]:
    """All stops of the run, oldest first; a line that a kill cut short is left out."""
    path = folder / "stops.jsonl"
    found: list[Stop] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(Stop(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name, unverified; 0 without one."""
    names = [path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _write(path: Path, record: Any) -> None:
    try:
        replace(path, (json.dumps(asdict(record), indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}: free or mount the disk") from error


def replace(path: Path, data: bytes) -> None:
    """Write beside and rename, so that a reader or a kill meets the old or the new file, never a half."""
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
