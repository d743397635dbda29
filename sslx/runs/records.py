"""Records in a run folder: status.json, job.json, starts.jsonl, stops.jsonl and metrics.jsonl.

Whatever a file holds, reading it returns values of the documented types or raises DataError.  This module imports
nothing heavy: a batch script and ``sslx jobs`` read the records in a tenth of a second.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from sslx.console.words import shown
from sslx.errors import DataError, StorageError
from sslx.machine import files
from sslx.machine.files import replace

State = Literal["running", "done", "stopped", "preempted", "failed"]
"""stopped: by the user's Ctrl-C.  preempted: by another signal, after which a job continues by itself."""


@dataclass(frozen=True)
class Status:
    """The state of a run, as in ``status.json``.  time: Unix time in seconds.  code: the exit code at its end."""

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
    """The job that owns a run folder, as in ``job.json``.

    id: Slurm's id (123 or 123_4), or the pid of a local job.  code: ``code_version()`` at submission.
    log: absolute path of the job's output.  submitted: Unix time in seconds.
    """

    cluster: Literal["slurm", "local", "debug"]
    id: str
    log: str
    code: str
    submitted: float

    def __post_init__(self) -> None:
        is_valid_id = _is_text(self.id) and re.fullmatch(r"(DEBUG_)?[0-9]{1,20}(_[0-9]{1,10})?", self.id)
        _check(self.cluster in ("slurm", "local", "debug"), bool(is_valid_id))  # the id is passed to kill and scancel
        _check(_is_text(self.log) and "\0" not in self.log, _is_text(self.code), _is_finite(self.submitted))


@dataclass(frozen=True, kw_only=True)
class Stop:
    """An end of a job that may start again: a line of ``stops.jsonl``.  step: that of the newest checkpoint."""

    time: float
    job: str
    code: int
    step: int
    reason: str

    def __post_init__(self) -> None:
        _check(_is_finite(self.time), _is_text(self.job), _is_int(self.code), _is_count(self.step))
        _check(_is_text(self.reason))


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of a run, on whatever machine: a line of ``starts.jsonl``.

    command: what was typed, quoted for a shell.  device: the name of rank 0's GPU or CPU.  cores: those that rank 0 may
    use.  hosts: those of all ranks.  code: ``code_version()``.  versions: of packages, by name.
    """

    time: float
    step: int
    command: str
    device: str
    cores: int
    hosts: list[str]
    code: str
    versions: dict[str, str]

    def __post_init__(self) -> None:
        _check(_is_finite(self.time), _is_count(self.step), _is_text(self.command), _is_text(self.device))
        _check(_is_count(self.cores), _are_texts(self.hosts), _is_text(self.code), _are_texts(self.versions))


Record = TypeVar("Record", Status, Job, Start, Stop)


def _check(*conditions: bool) -> None:
    """Raise ValueError unless all conditions hold for the values of a JSON file."""
    if not all(conditions):
        raise ValueError("a value has the wrong type")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(values: object) -> bool:
    """Return whether this is a list of texts, or a dict with texts as values."""
    if isinstance(values, dict):
        values = list(cast("dict[object, object]", values).values())
    return isinstance(values, list) and all(map(_is_text, cast("list[object]", values)))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**53) < value < 2**53


def _is_count(value: object) -> bool:
    return _is_int(value) and isinstance(value, int) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def write_status(folder: Path, state: State, step: int, reason: str = "", code: int = 0) -> None:
    """Replace ``status.json`` in the run folder atomically.  Raise StorageError if that fails."""
    _write(folder / "status.json", Status(state, step, reason, round(time.time(), 3), code))


def read_status(folder: Path) -> Status | None:
    """Return the status of a run, or None if it has none yet.  Raise DataError if the file is damaged."""
    return _read(Status, folder / "status.json")


def write_job(folder: Path, job: Job) -> None:
    """Record that the run belongs to this job.  Raise StorageError if that fails."""
    _write(folder / "job.json", job)


def read_job(folder: Path) -> Job | None:
    """Return the job of a run, or None if it has none.  Raise DataError if the file is damaged."""
    return _read(Job, folder / "job.json")


def add_stop(folder: Path, stop: Stop) -> None:
    """Append to ``stops.jsonl``.  Raise StorageError if that fails."""
    _append(folder / "stops.jsonl", stop)


def read_stops(folder: Path) -> list[Stop]:
    """Return all stops of the run, oldest first, without lines that are damaged or incomplete."""
    return _read_all(Stop, folder / "stops.jsonl")


def add_start(folder: Path, start: Start) -> None:
    """Append to ``starts.jsonl``.  Raise StorageError if that fails."""
    _append(folder / "starts.jsonl", start)


def read_starts(folder: Path) -> list[Start]:
    """Return all starts of the run, oldest first, without lines that are damaged or incomplete."""
    return _read_all(Start, folder / "starts.jsonl")


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a ``metrics.jsonl``, oldest first, as ``parse_metrics`` reads them, without damaged ones."""
    for line in _lines(path):
        if (metrics := parse_metrics(line)) is not None:
            yield metrics


def last_metrics(path: Path) -> dict[str, float]:
    """Return the last good line of a ``metrics.jsonl``, or {} if there is none."""
    last: dict[str, float] = {}
    for line in _lines(path, last_bytes=_MAX_LINE_BYTES):
        last = parse_metrics(line) or last
    return last


def parse_metrics(line: bytes) -> dict[str, float] | None:
    """Parse a line of ``metrics.jsonl``: ``step``, an integer of at least 0, and other numbers by name.

    null and non-finite numbers become nan, and values that are not numbers are left out.  Return None for a damaged
    or incomplete line.
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
    """Return the newest checkpoint's step by its name, unverified, or 0 without one.  Foreign folders are ignored."""
    named = [path for path in (folder / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    ours = [path for path in named if (path / "manifest.json").exists() or not any(path.glob("*"))]
    return max((int(path.name.removeprefix("step_")) for path in ours), default=0)


_MAX_LINE_BYTES = 1 << 16
"""A longer line is damaged."""


def _lines(path: Path, last_bytes: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file, or of its last bytes, where the first line may be incomplete.

    Yield nothing if the file does not exist.  Raise DataError if it cannot be read.
    """
    try:
        with open(path, "rb", opener=files.without_waiting) as file:
            if last_bytes:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            while line := file.readline(_MAX_LINE_BYTES):
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
        raise DataError(f"{shown(path)} is not a {name} record that sslx wrote: delete it to continue") from error


def _read_all(kind: type[Record], path: Path) -> list[Record]:
    """Return the records of a file of JSON lines, without lines that are damaged or incomplete."""
    records: list[Record] = []
    for line in _lines(path):
        try:
            records.append(kind(**files.parse_json(line)))
        except (ValueError, TypeError):
            continue
    return records


def _append(path: Path, record: Any) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: free or mount the disk") from error


def _write(path: Path, record: Any) -> None:
    try:
        replace(path, (json.dumps(asdict(record), indent=2) + "\n").encode())
    except OSError as error:
        raise StorageError(f"cannot write {shown(path)}: {error.strerror}: free or mount the disk") from error
