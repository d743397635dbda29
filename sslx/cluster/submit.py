"""``sslx submit``: a run, or an array of runs, as a job that goes on by itself.  The only importer of submitit.

submitit writes the batch script and its folder of pickles; ranks, signals and requeueing are ours (``job``,
``requeue``), since submitit's leave SIGTERM alone and save inside a signal handler.
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
from sslx.cluster.allocation import one_line
from sslx.cluster.job import Job
from sslx.config import PretrainConfig, flags, sweeps
from sslx.console import words
from sslx.console.words import shown
from sslx.errors import ConfigError, MissingInput
from sslx.machine import files
from sslx.machine.code_version import code_version
from sslx.runs import records
from sslx.train import resuming


def main(wanted: AllocationConfig, arguments: Sequence[str]) -> int:
    """Submit a run or an array of runs, print where their files are, and return the exit code.

    arguments: those of ``sslx pretrain``.  It returns as soon as the job is queued; a ``debug`` job has ended by then.
    """
    gpu = wanted.gpus_per_node > 0 if wanted.cluster == "slurm" else None  # of the job's machines, not of this one
    runs = sweeps.runs(wanted.array, arguments, gpu=gpu) if wanted.array else [config.load(arguments, gpu=gpu)]
    if "ranks" in flags.names(arguments):
        raise ConfigError(
            "the job says how many ranks there are: --nodes and --ranks-per-node before the --, no --ranks"
        )
    if len(runs) == 1:  # of which submitit makes no array
        wanted = dataclasses.replace(wanted, array=None)
    runs = [dataclasses.replace(run, runs=run.runs.absolute(), ranks=wanted.ranks) for run in runs]
    asks = wanted.cluster == "slurm" or any(jobs.is_on_slurm(_folder(run)) for run in runs)
    check(wanted, runs, jobs.queued() if asks and not wanted.dry_run else {})
    folder = _array_folder(config.load(arguments).name, runs) if wanted.array else _folder(runs[0])
    executor = prepared(wanted, folder, runs)
    script = batch_script(executor, len(runs)) if wanted.cluster == "slurm" else ""
    check_script(script, wanted)
    if wanted.dry_run:
        sys.stdout.write(script + "\n")
        return 0
    code = code_version()
    for run in runs:
        (_folder(run) / "job").mkdir(parents=True, exist_ok=True)
        (_folder(run) / "cancel").unlink(missing_ok=True)
        files.replace(_folder(run) / "job" / "recipe.json", config.dump(run).encode())
    if wanted.array:
        folder.mkdir(exist_ok=True)
        files.replace(folder / "runs.json", json.dumps([str(_folder(run)) for run in runs]).encode())
    todo = [Job(folder=str(_folder(run)), code=code) for run in runs]
    submitted = submit(executor, todo, wanted)
    for run, job in zip(runs, submitted, strict=True):
        record = records.Job(
            cluster=wanted.cluster, id=job.job_id, log=_log(wanted, folder, job), code=code, submitted=time.time()
        )
        records.write_job(_folder(run), record)
    if wanted.cluster == "debug":
        return submitted[0].result()
    sys.stdout.write(_summary(wanted, runs, submitted))
    return 0


def check(wanted: AllocationConfig, runs: Sequence[PretrainConfig], queue: jobs.Queue) -> None:
    """Raise ConfigError or MissingInput for what cannot run, before anything is queued or written."""
    if wanted.cluster == "slurm" and not wanted.dry_run and not shutil.which("sbatch"):
        raise MissingInput(
            "no Slurm on this machine (sbatch is not in PATH): submit on a login node, or take --cluster local"
        )
    if wanted.cluster != "slurm" and (wanted.nodes > 1 or wanted.array or wanted.dry_run):
        raise ConfigError(f"--nodes, --array and --dry-run need --cluster slurm, not {wanted.cluster}")
    for run in runs:
        check_place(_folder(run))
        share = wanted.nodes * wanted.ranks * run.micro_batches
        if run.batch_size % share:
            raise ConfigError(
                f"batch size {run.batch_size} must be divisible by nodes x ranks x micro-batches = {wanted.nodes} x "
                f"{wanted.ranks} x {run.micro_batches}: take --batch-size {max(1, run.batch_size // share) * share}"
            )
        folder = _folder(run)
        owner = records.read_job(folder)
        if owner and (state := jobs.live(owner, queue)):
            raise ConfigError(
                f"run {shown(folder)} belongs to job {owner.id}, which is {words.one_line(state)}: end it with "
                f"`sslx cancel {shown(folder)}`, or take another --name"
            )
        resuming.check_resumable(run, folder)


def check_place(folder: Path) -> None:
    """Raise ConfigError for a run folder whose path a batch script would not keep as it is."""
    one_line("the run folder", str(folder))
    try:
        os.lstat(folder)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"the run folder {shown(folder)} cannot be made: {files.reason(error)}") from error
    for character in "%\\":
        if character in str(folder):
            raise ConfigError(
                f"the run folder {shown(folder)} must be without {character}, which Slurm replaces: take another "
                "--runs or --name"
            )


def check_script(script: str, wanted: AllocationConfig) -> None:
    """Raise ConfigError for a batch script that cannot be written or whose setup lines are no shell script."""
    encoding = locale.getpreferredencoding(False)
    try:
        script.encode(encoding)
    except UnicodeEncodeError as error:
        letters = shown(script[error.start : error.end])
        raise ConfigError(f"the batch script cannot be written in {encoding}: it has '{letters}'") from error
    if wanted.setup and (bash := shutil.which("bash")):
        lines = "\n".join(wanted.setup).encode(encoding)
        if (done := subprocess.run([bash, "-n"], input=lines, capture_output=True, check=False)).returncode:
            raise ConfigError(f"--setup is no shell script: {words.one_line(os.fsdecode(done.stderr))}")


def prepared(wanted: AllocationConfig, folder: Path, runs: Sequence[PretrainConfig]) -> submitit.AutoExecutor:
    """submitit's executor with all that the job asks for."""
    pickles = folder if wanted.array else folder / "job"
    python = {"slurm_python": shlex.join(wanted.python_words)} if wanted.python else {}
    if wanted.dry_run and not shutil.which("srun"):  # submitit looks for it, but a script is all that is made
        submitit.SlurmExecutor.affinity = classmethod(lambda _: 1)  # pyright: ignore[reportAttributeAccessIssue]
    executor = submitit.AutoExecutor(pickles, wanted.cluster, **python)
    options: dict[str, Any] = {
        "name": runs[0].name,
        "nodes": wanted.nodes,
        "tasks_per_node": wanted.ranks if wanted.cluster == "slurm" else 1,  # elsewhere the launcher starts the ranks
        "timeout_min": wanted.minutes,
        "stderr_to_stdout": True,
    }
    options |= {"gpus_per_node": wanted.gpus_per_node} if wanted.gpus_per_node else {}
    if wanted.cluster == "slurm":
        given = {"cpus_per_task": wanted.cpus_per_rank, "mem_gb": wanted.mem_gb}
        given |= {f"slurm_{name}": getattr(wanted, name) for name in ("partition", "account", "qos", "constraint")}
        options |= {name: value for name, value in given.items() if value}
        options["slurm_signal_delay_s"] = wanted.signal_delay_s
        options["slurm_setup"], options["slurm_teardown"] = _around(wanted, folder)
        log = str(pickles / ("%A_%a.log" if wanted.array else "%j.log"))  # one for all ranks: rank 0 speaks for them
        options["slurm_srun_args"] = _srun(wanted, log)
        options["slurm_additional_parameters"] = {"output": log, "requeue": True, **_sbatch(wanted)}
        options["slurm_array_parallelism"] = wanted.at_once
    executor.update_parameters(**options)
    return executor


def _around(wanted: AllocationConfig, folder: Path) -> tuple[list[str], list[str]]:
    """Lines of the batch script before and after its step."""
    roots, interface = [str(path) for path in _roots()], shlex.quote(wanted.interface)
    before = [
        f"export SSLX_GIVE_UP_S={wanted.give_up_s:g}",
        *([f'export PYTHONPATH={shlex.quote(":".join(roots))}"${{PYTHONPATH:+:$PYTHONPATH}}"'] if roots else []),
        *([f"export GLOO_SOCKET_IFNAME={interface} NCCL_SOCKET_IFNAME={interface}"] * bool(wanted.interface)),
        *wanted.setup,
        "",
        "# Slurm's word to this shell itself (the step gets its own): wait for the step, then go on below.",
        "trap 'export SSLX_ENDED_BY_SLURM=1' TERM; trap : USR2",
        "started=$(date +%s)",
    ]
    after = [
        f'{shlex.quote(sys.executable)} -m sslx.cluster.requeue {shlex.quote(str(folder))} "$?" "$started"',
        'exit "$?"',
    ]
    return before, after


def _roots() -> list[Path]:
    """Folders that a node's Python must look into: none where sslx is installed, those of a checkout otherwise."""
    package = Path(__file__).parent
    checkout = package.parent
    return [] if "site-packages" in package.parts else [checkout, checkout / "kernels"]


def _srun(wanted: AllocationConfig, log: str) -> list[str]:
    arguments = ["--kill-on-bad-exit=1", f"--output={log}", "--open-mode=append"]
    # Since 22.05 srun does not know what sbatch was given.
    arguments += [f"--cpus-per-task={wanted.cpus_per_rank}"] if wanted.cpus_per_rank else []
    arguments += [f"--container-image={wanted.container}"] if wanted.container else []
    return arguments + ([f"--container-mounts={wanted.mounts}"] if wanted.mounts else [])


def _sbatch(wanted: AllocationConfig) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {"reservation": wanted.reservation} if wanted.reservation else {}
    for option in wanted.sbatch:
        options[wanted.sbatch_name(option)] = option.partition("=")[2] or True
    return options


def batch_script(executor: submitit.AutoExecutor, num_runs: int) -> str:
    """What ``sbatch`` would get."""
    inner: Any = vars(executor)["_executor"]
    if num_runs > 1:
        inner.parameters["map_count"] = num_runs
    script = inner._make_submission_file_text(inner._submitit_command_str, "")
    inner.parameters.pop("map_count", None)
    return script


def submit(executor: submitit.AutoExecutor, todo: Sequence[Job], wanted: AllocationConfig) -> list[submitit.Job[int]]:
    """Queue the jobs.  ConfigError with Slurm's own words where it refuses."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return executor.submit_array(todo) if wanted.array else [executor.submit(todo[0])]
    except FailedJobError as error:
        lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"Slurm refused the job: {words.one_line('; '.join(lines))}") from error


def _array_folder(name: str, runs: Sequence[PretrainConfig]) -> Path:
    """Of an array's pickles and logs: another for every other list of runs, whose tasks read it while they live."""
    names = "\n".join(run.name for run in runs)
    return runs[0].runs / f"{name}-array-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _folder(run: PretrainConfig) -> Path:
    return run.runs / run.name


def _log(wanted: AllocationConfig, folder: Path, job: submitit.Job[int]) -> str:
    if wanted.cluster != "slurm":
        return str(job.paths.stdout)
    return str((folder if wanted.array else folder / "job") / f"{job.job_id}.log")


def _summary(wanted: AllocationConfig, runs: Sequence[PretrainConfig], submitted: Sequence[submitit.Job[int]]) -> str:
    size = f"{wanted.nodes} node{'s' * (wanted.nodes > 1)} x {wanted.ranks} rank{'s' * (wanted.ranks > 1)}"
    setup = [f"  runs first   {words.one_line(line)}" for line in wanted.setup]  # a profile may have brought it
    if wanted.array:
        place = runs[0].runs
        lines = [f"submitted job array {submitted[0].job_id.partition('_')[0]}: {len(runs)} runs on {size} each"]
        lines += [f"  {job.job_id:12} {shown(_folder(run))}" for run, job in zip(runs, submitted, strict=True)]
        return "\n".join([*lines, *setup, f"  how they go  sslx jobs {shlex.quote(str(place))}", ""])
    folder = shlex.quote(str(_folder(runs[0])))
    return (
        f"submitted job {submitted[0].job_id}: {shown(runs[0].name)} on {size}\n"
        f"  run folder   {folder}\n"
        + "".join(f"{line}\n" for line in setup)
        + f"  follow it    sslx logs -f {folder}\n"
        f"  how it goes  sslx jobs {shlex.quote(str(runs[0].runs))}\n"
        f"  end it       sslx cancel {folder}\n"
    )
