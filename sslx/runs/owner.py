"""Who owns a run folder, as its ``owner.json`` says, and whether that process still lives.

A process of this machine is looked up; one of another machine is known by its Slurm job and by its heartbeat, for
neither its pid nor, on many shared file systems, its lock can be seen from here.  Imports nothing heavy.
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
"""Seconds between two signs of life of an owner."""
GONE_AFTER_S = 120.0
"""Seconds without a sign of life after which an owner on another machine counts as gone."""
_SLURM_S = 10.0
_MAY_LIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT", "CONFIGURING"}


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that has claimed a run folder.

    token: its own for every claim.  started: clock ticks after boot.  boot, pid_namespace: of its kernel; a pid has a
    meaning only there.  device: the file system's number there.  flocked: whether it holds the lock of its file.
    job, restarts, cluster: Slurm's, "" without.  since: Unix, in seconds.
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
    """This process as an owner."""
    return Owner(
        token=token,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=proc.started(os.getpid()) or "",
        boot=_boot(),
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
    """The owner that a file names, None where there is no file.

    What cannot be read, as a file that a full disk cut short, is an owner too: one known by its heartbeat alone.
    """
    try:
        tree = files.parse_json(files.read_bytes(path))
        kinds = {field.name: type(field.default) for field in fields(Owner)}
        for name, kind in (kinds | {"token": str}).items():
            if not isinstance(tree[name], (int, float) if kind is float else kind):
                raise ValueError(name)
        if not tree["token"].isalnum() or tree["pid"] < 1 or not 0 <= tree["since"] < 1e11:
            raise ValueError("none that sslx wrote")  # the token becomes a part of a file's name
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


def lives(owner: Owner, path: Path, now: float | None = None) -> bool:
    """Whether the owner that ``path`` names may still be at work.

    now: by the clock that stamps the file system's files; default: this machine's.
    """
    if owner.boot and owner.boot == _boot():  # of this kernel, though perhaps of another container
        device, held = _probe(path)
        if held is not None and owner.flocked and owner.device == device:
            return held
        if owner.pid_namespace == _pid_namespace():
            return _process_lives(owner.pid, owner.started)
    if owner.job and _job_has_ended(owner):
        return False
    return silence_s(path, now) <= GONE_AFTER_S


def silence_s(path: Path, now: float | None = None) -> float:
    """Seconds since the last heartbeat."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a file of NFS is to see it as it is now
    except OSError:
        return 0.0
    try:
        return (time.time() if now is None else now) - os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _probe(path: Path) -> tuple[int, bool | None]:
    """(device, whether somebody holds the lock of the file; None where the file system has no locks)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return 0, None
    try:
        return os.fstat(descriptor).st_dev, _held_by_another(descriptor)
    finally:
        os.close(descriptor)


def _held_by_another(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not take each other for owners
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None


def _process_lives(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    found = proc.started(pid)
    return found is None or found == started


@cache
def _boot() -> str:
    return proc.read("sys/kernel/random/boot_id").strip() or socket.gethostname()


@cache
def _pid_namespace() -> str:
    return proc.link("self/ns/pid")


def _restarts() -> int:
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def _job_has_ended(owner: Owner) -> bool:
    """Whether Slurm knows that the owner's start of its job is over; False where it does not know."""
    if owner.cluster != _cluster():
        return False
    if owner.job == os.environ.get("SLURM_JOB_ID") and owner.restarts < _restarts():
        return True  # this is the job itself, requeued
    if not shutil.which("squeue"):
        return False
    code, out, err = _ask("squeue", "--noheader", "--jobs", owner.job, "--format", "%T")
    if code:
        return "Invalid job id" in err
    return not _MAY_LIVE.intersection(out.split())


def _cluster() -> str:
    """The name of the Slurm cluster that this machine belongs to, "" without one."""
    if name := os.environ.get("SLURM_CLUSTER_NAME", ""):
        return name
    _, out, _ = _ask("scontrol", "show", "config") if shutil.which("scontrol") else (0, "", "")
    lines = (line.split("=", 1) for line in out.splitlines() if "=" in line)
    return next((value.strip() for name, value in lines if name.strip() == "ClusterName"), "")


def _ask(*argv: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SLURM_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 1, "", ""
    return done.returncode, done.stdout, done.stderr
