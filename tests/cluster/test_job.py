"""What a submitted job does on its node, without one: its environment, its code's version, its end."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.processes import TINY
from kit.python import python
from sslx import config
from sslx.cluster import job
from sslx.cluster.job import Job
from sslx.machine.code_version import code_version
from sslx.runs import records


def written(folder: Path, *flags: str) -> Path:
    """A run folder as ``sslx submit`` leaves it."""
    run = config.load([*TINY, "--runs", str(folder), "--name", "r", *flags])
    (folder / "r" / "job").mkdir(parents=True)
    (folder / "r" / "job" / "recipe.json").write_text(config.dump(run))
    return folder / "r"


def run_as_a_process(folder: Path, code: str, exit_code: int = 0) -> str:
    """What a job prints in a process of its own."""
    script = f"from sslx.cluster.job import Job; Job(folder={str(folder)!r}, code={code!r})()"
    return python("-c", script, exit_code=exit_code, without=("SLURM_",)).stdout


def stopped(script: str, line: str, delay_s: float = 0) -> int:
    """The exit code of a script that gets SIGTERM so long after it has printed a line like this."""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not re.match(line, printed := process.stdout.readline()):
            assert printed, "it ended"
        time.sleep(delay_s)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        return process.wait(100)


def test_a_job_is_small_and_pickled_by_reference(tmp_path: Path) -> None:
    text = pickle.dumps(Job(folder=str(tmp_path), code="0.1.0 abc def"))
    assert len(text) < 500
    assert pickle.loads(text) == Job(folder=str(tmp_path), code="0.1.0 abc def")


@pytest.mark.slow
def test_a_restart_with_other_code_says_so_and_one_with_the_same_does_not(tmp_path: Path) -> None:
    printed = run_as_a_process(written(tmp_path), "0.0.9 1234567 0123456789ab")
    said = "note: the code has changed since the job was submitted: 0.0.9 1234567 0123456789ab -> "
    assert printed.splitlines()[0] == said + code_version()
    assert "step 2/2" in printed
    assert "note:" not in run_as_a_process(tmp_path / "r", code_version())
    assert records.read_stops(tmp_path / "r") == []


@pytest.mark.slow
def test_without_slurm_the_job_itself_asks_whether_to_start_again(tmp_path: Path) -> None:
    """144 is what submitit's local executor starts again for."""
    folder = written(tmp_path, "--steps", "1000000", "--checkpoint.every", "0")
    script = f"from sslx.cluster.job import Job; Job(folder={str(folder)!r}, code='')()"
    assert stopped(script, r"step +2/") == 144
    (stop,) = records.read_stops(folder)
    assert (stop.code, stop.reason, stop.step >= 2) == (75, "SIGTERM", True)
    flags = "--source.name folder --data.backend dali --source.root /nowhere".split()
    run_as_a_process(wrong := written(tmp_path / "wrong", *flags), "", exit_code=66)
    assert records.read_stops(wrong)[-1].code == 66


@pytest.mark.slow
def test_a_local_job_that_is_stopped_before_its_first_step_starts_again_too(tmp_path: Path) -> None:
    """Where SIGTERM meets it depends on the machine: in the imports, in the build or in training."""
    folder = written(tmp_path, "--steps", "1000000", "--checkpoint.every", "0")
    script = (
        "from sslx.cluster import job\n"
        "version = job.code_version\n"
        "job.code_version = lambda: [version(), print('ready', flush=True)][0]\n"
        f"job.Job(folder={str(folder)!r}, code='')()\n"
    )
    assert [stopped(script, "ready\n", delay_s) for delay_s in (0.0, 1.5)] == [144, 144]
    assert [stop.code for stop in records.read_stops(folder)] == [75, 75]


def test_threads_are_the_tasks_share_and_what_is_set_stays() -> None:
    alone = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    shared = {"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "6"}
    cores = str(len(os.sched_getaffinity(0)))
    for environ, threads in ((alone, cores), (shared, "6"), (shared | {"OMP_NUM_THREADS": "3"}, "3")):
        job.set_environment(environ)
        assert environ["OMP_NUM_THREADS"] == threads
    environ = {"OTHER": "1"}
    job.set_environment(environ)
    assert environ.keys() == {"OTHER", "TTY_COMPATIBLE"}
