"""The owner of a run folder, as recorded in its ``owner.json``, and whether that process is still alive.

A process on this machine can be looked up.  For one on another machine, neither the pid nor, on many shared file
systems, the lock is visible, so its Slurm job and its heartbeat decide.  This module imports nothing heavy.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from sslx.console.words import one_line
from sslx.machine import files, proc

HEARTBEAT_S = 10.0
"""Seconds between an owner's heartbeats."""
GONE_AFTER_S = 120.0
"""Seconds without a heartbeat after which an owner on another machine counts as gone."""
_SLURM_TIMEOUT_S = 10.0
_UNFINISHED_STATES = {
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "RESIZING",
    "STAGE_OUT",
    "CONFIGURING",
}


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that has claimed a run folder.

    token: unique for each claim.  started: clock ticks after boot.  boot, pid_namespace: ids of the kernel's boot and
    pid namespace, in which alone a pid has a meaning.  device: the file system's number on that machine.  flocked:
    whether the owner holds a lock on the file.  job, restarts, cluster: Slurm's values, empty without Slurm.  since:
    Unix time in seconds.
    """

    token: str
    host: str = "an unknown host"
    pid: int = 0
    started: str = ""
    boot: str = ""
    pid_namespace: str = ""
    device: int = 0
    flocked: bool = False
    job: str = ""
    restarts: int = 0
    cluster: str = ""
    since: float = 0.0

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        since = f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}" if self.since else ""
        return f"process {self.pid} on {self.host}{job}{since}" if self.pid else "an unknown process"


def this_process(token: str, *, device: int, flocked: bool) -> Owner:
    """Return this process as an owner."""
    return Owner(
        token=token,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=proc.started(os.getpid()) or "",
        boot=_boot_id(),
        pid_namespace=_pid_namespace(),
        device=device,
        flocked=flocked,
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=_restarts(),
        cluster=_cluster() if "SLURM_JOB_ID" in os.environ else "",
        since=round(time.time(), 3),
    )


def dump(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=2) + "\n").encode()


def read(path: Path) -> Owner | None:
    """Return the owner that a file names, or None if the file does not exist.

    An unreadable file, such as one cut short by a full disk, also has an owner, known only by its heartbeat.
    """
    try:
        tree = files.parse_json(files.read_bytes(path))
        kinds = {field.name: type(field.default) for field in fields(Owner)}
        for name, kind in (kinds | {"token": str}).items():
            if not isinstance(tree[name], (int, float) if kind is float else kind):
                raise ValueError(name)
        if not tree["token"].isalnum() or tree["pid"] < 1 or not 0 <= tree["since"] < 1e11:
            raise ValueError("not written by sslx")  # the token becomes part of a file name
        return Owner(**{name: _printable(tree[name]) for name in kinds})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        return Owner(token=f"unreadable{status.st_ino}x{status.st_mtime_ns}")


def _printable(value: Any) -> Any:
    return one_line(value) if isinstance(value, str) else value


def is_alive(owner: Owner, path: Path, now: float | None = None) -> bool:
    """Return whether the owner that ``path`` names may still be running.

    now: the time on the clock that stamps files on the file system; the default is this machine's clock.
    """
    if owner.boot and owner.boot == _boot_id():  # the same kernel, but perhaps another container
        device, is_locked = _probe_lock(path)
        if is_locked is not None and owner.flocked and owner.device == device:
            return is_locked
        if owner.pid_namespace == _pid_namespace():
            return _process_is_alive(owner.pid, owner.started)
    if owner.job and _job_has_ended(owner):
        return False
    return silence_s(path, now) <= GONE_AFTER_S


def silence_s(path: Path, now: float | None = None) -> float:
    """Return the number of seconds since the last heartbeat."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # on NFS, opening a file refreshes its attributes
    except OSError:
        return 0.0
    try:
        return (time.time() if now is None else now) - os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _probe_lock(path: Path) -> tuple[int, bool | None]:
    """Return the file's device and whether another process holds its lock (None if the file system has no locks)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return 0, None
    try:
        return os.fstat(descriptor).st_dev, _is_locked_by_another(descriptor)
    finally:
        os.close(descriptor)


def _is_locked_by_another(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two probes do not block each other
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def _process_is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process
    current_start = proc.started(pid)
    return current_start is None or current_start == started


@cache
def _boot_id() -> str:
    return proc.read("sys/kernel/random/boot_id").strip() or socket.gethostname()


@cache
def _pid_namespace() -> str:
    return proc.link("self/ns/pid")


def _restarts() -> int:
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def _job_has_ended(owner: Owner) -> bool:
    """Return whether Slurm knows that this start of the owner's job is over (False if Slurm does not know)."""
    if owner.cluster != _cluster():
        return False
    if owner.job == os.environ.get("SLURM_JOB_ID") and owner.restarts < _restarts():
        return True  # this is the job itself, requeued
    if not shutil.which("squeue"):
        return False
    code, out, err = _run_slurm("squeue", "--noheader", "--jobs", owner.job, "--format", "%T")
    if code:
        return "Invalid job id" in err
    return not _UNFINISHED_STATES.intersection(out.split())


def _cluster() -> str:
    """Return the name of this machine's Slurm cluster, or "" without one."""
    if name := os.environ.get("SLURM_CLUSTER_NAME", ""):
        return name
    _, out, _ = _run_slurm("scontrol", "show", "config") if shutil.which("scontrol") else (0, "", "")
    lines = (line.split("=", 1) for line in out.splitlines() if "=" in line)
    return next((value.strip() for name, value in lines if name.strip() == "ClusterName"), "")


def _run_slurm(*argv: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr
