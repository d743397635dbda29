"""Environment variables of this process, validated: ranks, ports, threads and times.

This module imports nothing heavy, so that mistakes are reported before torch is imported.
"""

import math
import os
import re
from collections.abc import Mapping, MutableMapping

from sslx.errors import ConfigError

_GPU = re.compile(r"-1|\d+|(GPU|MIG)-[\w./-]+|NoDevFiles|none", re.ASCII)
_THREADS = re.compile(r"\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*", re.ASCII)


def integer(environ: Mapping[str, str], name: str, low: int, high: int | None, remedy: str) -> int:
    """Return a variable's value.  Raise ConfigError, with the remedy at the end, unless low <= value <= high."""
    text = environ[name].strip()
    value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII) else None
    if value is None or value < low or (high is not None and value > high):
        between = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"expected {name} to be an integer {between}, got {environ[name]!r:.80}: {remedy}")
    return value


def seconds(name: str, default: float, environ: Mapping[str, str] = os.environ) -> float:
    """Return a time in seconds, which may be ``inf``.  Raise ConfigError unless it is a positive number."""
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:  # NaN, too
        raise ConfigError(
            f"expected {name} to be a number of seconds above 0, got {text!r:.80}: unset it for the default"
        )
    return value


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for what libraries would ignore, report in their own words, or crash on.

    Besides variables, this covers a current folder that was deleted.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the current folder does not exist anymore: change to another one and start again") from error
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads and not _THREADS.fullmatch(threads):
        raise ConfigError(
            f"expected OMP_NUM_THREADS to be a number of threads, got {threads!r:.80}: unset or correct it"
        )
    gpus = environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in gpus.split(",")] if gpus.strip() else []
    if not all(_GPU.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise ConfigError(
            f"expected CUDA_VISIBLE_DEVICES to be distinct GPU numbers or UUIDs with commas, got {gpus!r:.80}: "
            "unset it to use all GPUs, or leave it empty to use none"
        )
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"):
        if name in environ:
            integer(environ, name, 1, None, "Slurm sets it; unset it outside of a job")
    for name in ("SSLX_GIVE_UP_S", "SSLX_JOIN_S", "SSLX_STALL_S"):
        seconds(name, math.inf, environ)
    environ = dict(environ)  # ``ranks`` sets variables
    if ranks(environ)[1] > 1:
        meeting_point(environ)


def is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process.

    A batch script has the job's SLURM_NTASKS and a SLURM_PROCID of 0 even though it is alone, and so does salloc's
    shell.  Only srun's tasks have a step, and its number of tasks.
    """
    return {"SLURM_PROCID", "SLURM_STEP_ID"} <= environ.keys()


def ranks(environ: MutableMapping[str, str]) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's variables, or else Slurm's, or else (0, 1, 0).

    Under Slurm, set MASTER_ADDR and MASTER_PORT unless they are set.  Raise ConfigError for impossible values.
    """
    if "RANK" in environ:
        remedy = "torchrun sets it; unset RANK and WORLD_SIZE to run without torchrun"
        if "WORLD_SIZE" not in environ:
            raise ConfigError("expected WORLD_SIZE beside RANK, but it is not set: use torchrun, or unset RANK")
        world_size = integer(environ, "WORLD_SIZE", 1, None, remedy)
        rank = integer(environ, "RANK", 0, world_size - 1, remedy)
        local = environ if environ.get("LOCAL_RANK") else {"LOCAL_RANK": "0"}
        return rank, world_size, integer(local, "LOCAL_RANK", 0, world_size - 1, remedy)
    if not is_slurm_task(environ):
        return 0, 1, 0
    remedy = "Slurm sets it for the tasks of srun"
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    num_tasks = integer({name: "1", **environ}, name, 1, None, remedy)
    rank = integer(environ, "SLURM_PROCID", 0, num_tasks - 1, remedy)
    if num_tasks > 1:
        environ.setdefault("MASTER_ADDR", first_host(environ))
        environ.setdefault("MASTER_PORT", str(_slurm_port(environ)))
    return rank, num_tasks, integer({"SLURM_LOCALID": "0", **environ}, "SLURM_LOCALID", 0, num_tasks - 1, remedy)


def launched_rank(environ: MutableMapping[str, str] = os.environ) -> int | None:
    """Return this process's rank if torchrun or Slurm started it, else None."""
    return ranks(environ)[0] if "RANK" in environ or is_slurm_task(environ) else None


def local_world_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks on this machine, which share its cores."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if match := re.match(r"\d+", environ.get(name, "")):
            return max(1, int(match.group()))
    return 1


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the host and port of the ranks' store.  Raise ConfigError if they are not set or are invalid."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise ConfigError(f"expected {name} beside RANK and WORLD_SIZE, but it is not set: use torchrun")
    port = integer(environ, "MASTER_PORT", 1, 65_535, "torchrun sets it; otherwise choose a free port")
    return environ["MASTER_ADDR"], port


def first_host(environ: Mapping[str, str]) -> str:
    """Return the first of Slurm's hosts, where Slurm starts task 0: ``n[03-05,9],m1`` -> ``n03``."""
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group() if first else hosts)


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Return a port below the ephemeral ones that differs for each job and each step of a job."""
    remedy = "Slurm sets it; set MASTER_PORT to avoid needing it"
    step = integer(environ, "SLURM_STEP_ID", 0, None, remedy)
    job = integer({"SLURM_JOB_ID": "0", **environ}, "SLURM_JOB_ID", 0, None, remedy)
    return 12_000 + (job + 4_099 * step) % 20_000
