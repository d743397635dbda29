"""``sslx submit``: submit a run, or an array of runs, as jobs that requeue themselves.  The only importer of submitit.

submitit writes the batch script and its folder of pickles.  Ranks, signals and requeueing are handled by ``job`` and
``requeue``, because submitit ignores SIGTERM and saves inside a signal handler.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import locale
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from sslx import config
from sslx.cluster import jobs
from sslx.cluster.allocation import Config as AllocationConfig
from sslx.cluster.allocation import check_one_line
from sslx.cluster.job import Job
from sslx.config import PretrainConfig, flags, sweeps
from sslx.console import words
from sslx.console.words import shown
from sslx.errors import ConfigError, MissingInput
from sslx.machine import files
from sslx.machine.code_version import code_version
from sslx.runs import records
from sslx.train import resuming


def main(allocation: AllocationConfig, arguments: Sequence[str]) -> int:
    """Submit a run or an array of runs, print where their files are, and return the exit code.

    arguments: those of ``sslx pretrain``.  The function returns once the job is queued, but waits for a ``debug`` job.
    """
    gpu = allocation.gpus_per_node > 0 if allocation.cluster == "slurm" else None  # of the job's machines, not this one
    runs = sweeps.runs(allocation.array, arguments, gpu=gpu) if allocation.array else [config.load(arguments, gpu=gpu)]
    if "ranks" in flags.names(arguments):
        raise ConfigError("--ranks cannot be used in a job: set --nodes and --ranks-per-node before the -- instead")
    if len(runs) == 1:  # submitit does not make an array of a single run
        allocation = dataclasses.replace(allocation, array=None)
    runs = [dataclasses.replace(run, runs=run.runs.absolute(), ranks=allocation.ranks) for run in runs]
    needs_queue = allocation.cluster == "slurm" or any(jobs.is_on_slurm(_folder(run)) for run in runs)
    check(allocation, runs, jobs.read_queue() if needs_queue and not allocation.dry_run else {})
    folder = _array_folder(config.load(arguments).name, runs) if allocation.array else _folder(runs[0])
    executor = build_executor(allocation, folder, runs)
    script = batch_script(executor, len(runs)) if allocation.cluster == "slurm" else ""
    check_script(script, allocation)
    if allocation.dry_run:
        sys.stdout.write(script + "\n")
        return 0
    code = code_version()
    for run in runs:
        (_folder(run) / "job").mkdir(parents=True, exist_ok=True)
        (_folder(run) / "cancel").unlink(missing_ok=True)
        files.replace(_folder(run) / "job" / "recipe.json", config.dump(run).encode())
    if allocation.array:
        folder.mkdir(exist_ok=True)
        files.replace(folder / "runs.json", json.dumps([str(_folder(run)) for run in runs]).encode())
    to_submit = [Job(folder=str(_folder(run)), code=code) for run in runs]
    submitted = submit(executor, to_submit, allocation)
    for run, job in zip(runs, submitted, strict=True):
        record = records.Job(
            cluster=allocation.cluster,
            id=job.job_id,
            log=_log(allocation, folder, job),
            code=code,
            submitted=time.time(),
        )
        records.write_job(_folder(run), record)
    if allocation.cluster == "debug":
        return submitted[0].result()
    sys.stdout.write(_summary(allocation, runs, submitted))
    return 0


def check(allocation: AllocationConfig, runs: Sequence[PretrainConfig], queue: jobs.Queue) -> None:
    """Raise ConfigError or MissingInput for a job that cannot run, before anything is queued or written."""
    if allocation.cluster == "slurm" and not allocation.dry_run and not shutil.which("sbatch"):
        raise MissingInput(
            "Slurm is not available here (sbatch is not in PATH): submit on a login node, or use --cluster local"
        )
    if allocation.cluster != "slurm" and (allocation.nodes > 1 or allocation.array or allocation.dry_run):
        raise ConfigError(f"--nodes, --array and --dry-run need --cluster slurm, not {allocation.cluster}")
    for run in runs:
        check_path(_folder(run))
        divisor = allocation.nodes * allocation.ranks * run.batches_per_step
        if run.batch_size % divisor:
            raise ConfigError(
                f"batch size {run.batch_size} must be divisible by nodes x ranks x micro-batches = {allocation.nodes} "
                f"x {allocation.ranks} x {run.batches_per_step}: use --batch-size "
                f"{max(1, run.batch_size // divisor) * divisor}"
            )
        folder = _folder(run)
        owner = records.read_job(folder)
        if owner and (state := jobs.job_state(owner, queue)):
            raise ConfigError(
                f"run {shown(folder)} belongs to job {owner.id}, which is {words.one_line(state)}: end it with "
                f"`sslx cancel {shown(folder)}`, or choose another --name"
            )
        resuming.check_resumable(run, folder)


def check_path(folder: Path) -> None:
    """Raise ConfigError for a run folder whose path a batch script would change."""
    check_one_line("the run folder", str(folder))
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot create the run folder {shown(folder)}: {files.reason(error)}") from error
    for character in "%\\":
        if character in str(folder):
            raise ConfigError(
                f"the path of the run folder, {shown(folder)}, must not contain {character}, which Slurm replaces: "
                "choose another --runs or --name"
            )


def check_script(script: str, allocation: AllocationConfig) -> None:
    """Raise ConfigError if the script cannot be written, or if its setup lines are not valid shell code."""
    encoding = locale.getpreferredencoding(False)
    try:
        script.encode(encoding)
    except UnicodeEncodeError as error:
        characters = shown(script[error.start : error.end])
        raise ConfigError(f"cannot write the batch script in {encoding}: it contains '{characters}'") from error
    if allocation.setup and (bash := shutil.which("bash")):
        lines = "\n".join(allocation.setup).encode(encoding)
        if (done := subprocess.run([bash, "-n"], input=lines, capture_output=True, check=False)).returncode:
            raise ConfigError(f"--setup is not valid shell code: {words.one_line(os.fsdecode(done.stderr))}")


def build_executor(allocation: AllocationConfig, folder: Path, runs: Sequence[PretrainConfig]) -> submitit.AutoExecutor:
    """Build submitit's executor with everything that the job requests."""
    pickles = folder if allocation.array else folder / "job"
    python = {"slurm_python": shlex.join(allocation.python_words)} if allocation.python else {}
    if allocation.dry_run and not shutil.which("srun"):  # submitit requires srun, but a dry run only writes the script
        submitit.SlurmExecutor.affinity = classmethod(lambda _: 1)  # pyright: ignore[reportAttributeAccessIssue]
    executor = submitit.AutoExecutor(pickles, allocation.cluster, **python)
    options: dict[str, Any] = {
        "name": runs[0].name,
        "nodes": allocation.nodes,
        "tasks_per_node": allocation.ranks if allocation.cluster == "slurm" else 1,  # else the launcher starts ranks
        "timeout_min": allocation.minutes,
        "stderr_to_stdout": True,
    }
    if allocation.gpus_per_node:
        options["gpus_per_node"] = allocation.gpus_per_node
    if allocation.cluster == "slurm":
        requests: dict[str, Any] = {"cpus_per_task": allocation.cpus_per_rank, "mem_gb": allocation.mem_gb}
        for name in ("partition", "account", "qos", "constraint"):
            requests[f"slurm_{name}"] = getattr(allocation, name)
        options |= {name: value for name, value in requests.items() if value}
        options["slurm_signal_delay_s"] = allocation.signal_delay_s
        options["slurm_setup"], options["slurm_teardown"] = _setup_and_teardown(allocation, folder)
        log = str(pickles / ("%A_%a.log" if allocation.array else "%j.log"))  # one file, as only rank 0 prints
        options["slurm_srun_args"] = _srun_arguments(allocation, log)
        options["slurm_additional_parameters"] = {"output": log, "requeue": True, **_sbatch_options(allocation)}
        options["slurm_array_parallelism"] = allocation.at_once
    executor.update_parameters(**options)
    return executor


def _setup_and_teardown(allocation: AllocationConfig, folder: Path) -> tuple[list[str], list[str]]:
    """Return the lines of the batch script before and after its step."""
    setup = [f"export SSLX_GIVE_UP_S={allocation.give_up_s:g}"]
    if roots := [str(path) for path in _roots()]:
        setup.append(f'export PYTHONPATH={shlex.quote(":".join(roots))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    if allocation.interface:
        interface = shlex.quote(allocation.interface)
        setup.append(f"export GLOO_SOCKET_IFNAME={interface} NCCL_SOCKET_IFNAME={interface}")
    setup += [
        *allocation.setup,
        "",
        "# When Slurm signals this shell itself (the step gets its own signal), wait for the step and continue below.",
        "trap 'export SSLX_ENDED_BY_SLURM=1' TERM; trap : USR2",
        "started=$(date +%s)",
    ]
    teardown = [
        f'{shlex.quote(sys.executable)} -m sslx.cluster.requeue {shlex.quote(str(folder))} "$?" "$started"',
        'exit "$?"',
    ]
    return setup, teardown


def _roots() -> list[Path]:
    """Return the folders to add to a node's PYTHONPATH: those of a checkout, or none where sslx is installed."""
    checkout = Path(__file__).parents[2]
    return [checkout, checkout / "kernels"] if (checkout / "kernels" / "sslx_kernels").is_dir() else []


def _srun_arguments(allocation: AllocationConfig, log: str) -> list[str]:
    arguments = ["--kill-on-bad-exit=1", f"--output={log}", "--open-mode=append"]
    if allocation.cpus_per_rank:  # since Slurm 22.05, srun does not inherit it from sbatch
        arguments.append(f"--cpus-per-task={allocation.cpus_per_rank}")
    if allocation.container:
        arguments.append(f"--container-image={allocation.container}")
    if allocation.mounts:
        arguments.append(f"--container-mounts={allocation.mounts}")
    return arguments


def _sbatch_options(allocation: AllocationConfig) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {"reservation": allocation.reservation} if allocation.reservation else {}
    for option in allocation.sbatch:
        options[allocation.sbatch_name(option)] = option.partition("=")[2] or True
    return options


def batch_script(executor: submitit.AutoExecutor, num_runs: int) -> str:
    """Return the script that ``sbatch`` would get."""
    inner: Any = vars(executor)["_executor"]
    if num_runs > 1:
        inner.parameters["map_count"] = num_runs
    script = inner._make_submission_file_text(inner._submitit_command_str, "")
    inner.parameters.pop("map_count", None)
    return script


def submit(
    executor: submitit.AutoExecutor, to_submit: Sequence[Job], allocation: AllocationConfig
) -> list[submitit.Job[int]]:
    """Queue the jobs.  Raise ConfigError with Slurm's message if it refuses them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return executor.submit_array(to_submit) if allocation.array else [executor.submit(to_submit[0])]
    except FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"Slurm refused the job: {words.one_line('; '.join(lines))}") from error


def _array_folder(name: str, runs: Sequence[PretrainConfig]) -> Path:
    """Folder for a job array's pickles and logs.

    Each distinct list of runs has its own folder, because running tasks still read theirs.
    """
    names = "\n".join(run.name for run in runs)
    return runs[0].runs / f"{name}-array-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _folder(run: PretrainConfig) -> Path:
    return run.runs / run.name


def _log(allocation: AllocationConfig, folder: Path, job: submitit.Job[int]) -> str:
    if allocation.cluster != "slurm":
        return str(job.paths.stdout)
    return str((folder if allocation.array else folder / "job") / f"{job.job_id}.log")


def _summary(
    allocation: AllocationConfig, runs: Sequence[PretrainConfig], submitted: Sequence[submitit.Job[int]]
) -> str:
    size = f"{words.plural(allocation.nodes, 'node')} x {words.plural(allocation.ranks, 'rank')}"
    setup = [f"  runs first   {words.one_line(line)}" for line in allocation.setup]  # shown, as it may be a profile's
    if allocation.array:
        runs_folder = shlex.quote(str(runs[0].runs))
        lines = [f"submitted job array {submitted[0].job_id.partition('_')[0]}: {len(runs)} runs on {size} each"]
        lines += [f"  {job.job_id:12} {shown(_folder(run))}" for run, job in zip(runs, submitted, strict=True)]
        return "\n".join([*lines, *setup, f"  show states  sslx jobs {runs_folder}", ""])
    folder = shlex.quote(str(_folder(runs[0])))
    return (
        f"submitted job {submitted[0].job_id}: {shown(runs[0].name)} on {size}\n"
        f"  run folder   {folder}\n"
        + "".join(f"{line}\n" for line in setup)
        + f"  follow log   sslx logs -f {folder}\n"
        f"  show state   sslx jobs {shlex.quote(str(runs[0].runs))}\n"
        f"  cancel       sslx cancel {folder}\n"
    )
