"""How a run stands, where it runs, how often it stopped and what it logged: the records in its folder.

They are status.json, job.json, stops.jsonl and metrics.jsonl.  Whatever they hold, reading gives what was promised or
raises DataError.  Imports nothing heavy: a batch script and ``sslx jobs`` ask in a tenth of a second.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from sslx.console.words import shown
from sslx.errors import DataError, StorageError
from sslx.machine import files
from sslx.machine.files import replace

State = Literal["running", "done", "stopped", "preempted", "failed"]
"""stopped: by the user's Ctrl-C.  preempted: by another signal, after which a job goes on by itself."""


@dataclass(frozen=True)
class Status:
    """How a run stands: what ``status.json`` holds.  time: Unix, in seconds.  code: the exit code of its end."""

    state: State
    step: int
    reason: str
    time: float
    code: int = 0

    def __post_init__(self) -> None:
        _check(self.state in get_args(State), _is_count(self.step), _is_text(self.reason))
        _check(_is_finite(self.time), _is_int(self.code))


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

    def __post_init__(self) -> None:
        numbered = _is_text(self.id) and re.fullmatch(r"(DEBUG_)?[0-9]{1,20}(_[0-9]{1,10})?", self.id)
        _check(self.cluster in ("slurm", "local", "debug"), bool(numbered))  # the id goes into kill and scancel
        _check(_is_text(self.log) and "\0" not in self.log, _is_text(self.code), _is_finite(self.submitted))


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One end of a job that may start again: a line of ``stops.jsonl``.  step: of the newest checkpoint."""

    time: float
    job: str
    code: int
    step: int
    reason: str

    def __post_init__(self) -> None:
        _check(_is_finite(self.time), _is_text(self.job), _is_int(self.code), _is_count(self.step))
        _check(_is_text(self.reason))


Record = TypeVar("Record", Status, Job, Stop)


def _check(*right: bool) -> None:
    """Raise ValueError unless all are: the types of what a JSON file holds."""
    if not all(right):
        raise ValueError("a value of another type")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**53) < value < 2**53


def _is_count(value: object) -> bool:
    return _is_int(value) and isinstance(value, int) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def write_status(folder: Path, state: State, step: int, reason: str = "", code: int = 0) -> None:
    """Replace ``status.json`` in the run folder atomically.  StorageError where that fails."""
    _write(folder / "status.json", Status(state, step, reason, round(time.time(), 3), code))


def read_status(folder: Path) -> Status | None:
    """The status of a run, None where it has none yet.  DataError where the file is not one."""
    return _read(Status, folder / "status.json")


def write_job(folder: Path, job: Job) -> None:
    """Say that the run belongs to this job.  StorageError where that fails."""
    _write(folder / "job.json", job)


def read_job(folder: Path) -> Job | None:
    """The job of a run, None where it has none.  DataError where the file is not one."""
    return _read(Job, folder / "job.json")


def add_stop(folder: Path, stop: Stop) -> None:
    """Append to ``stops.jsonl``.  StorageError where that fails."""
    path = folder / "stops.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(stop)) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: free or mount the disk") from error


def read_stops(folder: Path) -> list[Stop]:
    """All stops of the run, oldest first; a line that is damaged or that a kill cut short is left out."""
    found: list[Stop] = []
    for line in _lines(folder / "stops.jsonl"):
        try:
            found.append(Stop(**files.parse_json(line)))
        except (ValueError, TypeError):
            continue
    return found


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The lines of a ``metrics.jsonl``, oldest first, as ``metrics_of`` reads them; damaged ones are left out."""
    for line in _lines(path):
        if (metrics := metrics_of(line)) is not None:
            yield metrics


def last_metrics(path: Path) -> dict[str, float]:
    """The last good line of a ``metrics.jsonl``, {} without one."""
    last: dict[str, float] = {}
    for line in _lines(path, last_bytes=_LINE_BYTES):
        last = metrics_of(line) or last
    return last


def metrics_of(line: bytes) -> dict[str, float] | None:
    """A line of ``metrics.jsonl``: ``step``, a whole number of at least 0, and other numbers by name.

    null, and what is not finite, is nan; values that are no numbers are left out.  None for a line that is damaged or
    was not finished.
    """
    try:
        values = files.parse_json(line)
    except ValueError:
        return None
    if not line.endswith(b"\n") or not _is_count(values.get("step")):
        return None
    numbers: dict[str, Any] = {name: value for name, value in values.items() if value is None or _is_number(value)}
    return {name: value if _is_finite(value) else math.nan for name, value in numbers.items()}


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint by its name, unverified; 0 without one.  Foreign folders do not count."""
    found = [path for path in (folder / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    ours = [path for path in found if (path / "manifest.json").exists() or not any(path.glob("*"))]
    return max((int(path.name.removeprefix("step_")) for path in ours), default=0)


_LINE_BYTES = 1 << 16
"""Of a line; a longer one is damaged."""


def _lines(path: Path, last_bytes: int | None = None) -> Iterator[bytes]:
    """Of a file, or of its end, where the first may be cut.  None where it is not there; DataError if unreadable."""
    try:
        with open(path, "rb", opener=files.without_waiting) as file:
            if last_bytes:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            while line := file.readline(_LINE_BYTES):
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {files.reason(error)}") from error


def _read(kind: type[Record], path: Path) -> Record | None:
    try:
        return kind(**files.parse_json(files.read_bytes(path)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {files.reason(error)}") from error
    except (ValueError, TypeError) as error:
        name = kind.__name__.lower()
        raise DataError(f"{shown(path)} is no {name} that sslx wrote: delete it to go on without") from error


def _write(path: Path, record: Any) -> None:
    try:
        replace(path, (json.dumps(asdict(record), indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: free or mount the disk") from error
