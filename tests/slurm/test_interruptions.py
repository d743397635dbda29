"""Runs on two nodes of a real Slurm, disturbed, and what comes of them: the weights of an undisturbed run, bitwise.

The scenarios are S1 to S8 of what preemption, limits, node failures, crashes and hangs do to jobs elsewhere.
"""

import os
import re
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kit.on_slurm import ALLOCATION, ROOT, SMALL, STEPS, Run, is_undisturbed, slurm, submitted
from kit.processes import TINY, until
from sslx import cli
from sslx.cluster import jobs
from sslx.machine.code_version import code_version
from sslx.runs import records

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]
Weights = dict[str, torch.Tensor]


@pytest.mark.timeout(600)
def test_a_run_that_meets_everything_has_the_weights_of_one_that_meets_nothing(
    tmp_path: Path, reference: Weights
) -> None:
    """S1, S2, S5 and S6, one after the other, on one run.

    Signals and preemption repeat no step.  What leaves no time to save repeats those since the last save.
    """
    run = submitted(tmp_path, "--checkpoint.every", "10")

    def stop(after: int) -> records.Stop:
        """The run's newest stop, which is its so-and-so-manyeth."""
        until(lambda: len(records.read_stops(run.folder)) > after, f"stop {after + 1}")
        return records.read_stops(run.folder)[after]

    run.until_step(5)
    before = run.step
    run.signal("TERM")
    run.signal("USR2")
    first = stop(0)
    assert (first.code, first.reason) == (75, "SIGTERM")
    assert first.step >= before

    run.until_step(first.step + 5)
    assert f"resumed {run.folder} at step {first.step}" in run.log
    before = run.step
    slurm("sbatch", *"--partition high --nodes 2 --exclusive --output /dev/null --wrap".split(), "srun sleep 1")
    preempted = stop(1)
    assert (preempted.code, preempted.reason) == (75, "SIGTERM")
    assert preempted.step >= before
    run.until_step(preempted.step + 5)
    assert run.repeated() == 0

    os.kill(run.rank(1), signal.SIGKILL)
    killed = stop(2)
    assert killed.code in (70, 137)
    run.until_step(killed.step + 12)

    os.kill(run.rank(1), signal.SIGSTOP)
    time.sleep(0.5)
    run.signal("USR2")
    hanging = stop(3)
    assert hanging.reason.startswith("SIGUSR2; rank 1 on ")
    assert hanging.reason.endswith("no step ended in 6 s")
    is_undisturbed(run, reference, repeated=2 * 11)
    assert len(records.read_stops(run.folder)) == 4


def test_s3_the_time_limit_is_no_end(tmp_path: Path, reference: Weights) -> None:
    """Slurm looks at limits every 30 s and asks up to 60 s early; a rank that stands still makes the run last."""
    allocation = [
        *ALLOCATION,
        "--time",
        "2",
        "--signal-delay-s",
        "40",
        "--give-up-s",
        "30",
    ]  # a start may take a minute
    run = submitted(tmp_path, "--checkpoint.every", "0", allocation=allocation)
    run.until_step(5)
    before = len(records.read_stops(run.folder))  # 1 where the limit came while the run was still starting
    rank = run.rank(1)
    os.kill(rank, signal.SIGSTOP)

    def stopped() -> bool:
        with suppress(FileNotFoundError, ProcessLookupError):  # Slurm has let it go by itself, and it has ended
            if is_pending(rank, signal.SIGUSR2):
                os.kill(rank, signal.SIGCONT)
        return len(records.read_stops(run.folder)) > before

    until(stopped, "the limit", 300)  # beside others it starts late
    is_undisturbed(run, reference)
    stops = records.read_stops(run.folder)  # a slow machine comes to its limit again
    assert {(stop.code, stop.reason) for stop in stops} == {(75, "SIGUSR2")}
    assert 5 <= stops[before].step <= stops[-1].step < STEPS


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process that stands still has been sent the signal."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)) >> (number - 1) & 1)


@pytest.mark.soak
def test_cancelling_saves_and_is_not_requeued(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = submitted(tmp_path, "--steps", "100000", "--checkpoint.every", "0")
    run.until_step(5)
    capfd.readouterr()
    assert cli.main(["cancel", str(run.folder)]) == 0
    saved = records.newest_step(run.folder)
    assert saved >= 5
    assert f"from step {saved}" in capfd.readouterr().out
    time.sleep(1)
    assert not run.state
    assert [stop.reason for stop in records.read_stops(run.folder)] == ["sslx cancel"]
    assert "Restarts=0" in slurm("scontrol", "show", "job", run.job.id, "-o")


@pytest.mark.soak
def test_s7_torchrun_without_submitit_is_preempted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Weights
) -> None:
    monkeypatch.chdir(ROOT)
    given = {"NAME": "r", "RUNS": str(tmp_path), "RANKS": "1", "SSLX_GIVE_UP_S": "6"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = ["sbatch", "--parsable", "--nodes", "2", "--partition", "low", "--cpus-per-task", "1", "--output"]
    job = slurm(*asked, f"{tmp_path}/job.log", "slurm/pretrain.sbatch", *SMALL, "--log.wandb", "offline")
    until(lambda: (tmp_path / "r" / "job.json").exists(), "the job owns its run")
    record = records.read_job(tmp_path / "r")
    assert record is not None
    assert (record.id, record.log, record.code) == (job, f"{tmp_path}/job.log", code_version())
    run = Run(tmp_path / "r", record)
    run.until_step(20)
    run.signal("USR2")
    is_undisturbed(run, reference)
    (stop,) = records.read_stops(run.folder)
    assert (stop.code, stop.reason, stop.step >= 20) == (75, "SIGUSR2", True)
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 2
    assert len({path.name.split("-")[-1] for path in (run.folder / "wandb").glob("offline-run-*")}) == 1


@pytest.mark.soak
def test_s8_one_run_of_an_array_is_requeued_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.toml"
    sweep.write_text("[grid]\nseed = [0, 1, 2]\n")
    argv = "--nodes 1 --partition low --cpus-per-rank 1 --mem-gb 1 --time 10 --signal-delay-s 60".split()
    argv = [
        "submit",
        *argv,
        "--array",
        str(sweep),
        "--",
        *TINY,
        "--steps",
        "400",
        "--runs",
        str(tmp_path),
        "--name",
        "r",
    ]
    assert cli.main([*argv, "--checkpoint.every", "0"]) == 0
    assert "submitted job array" in capfd.readouterr().out
    runs = [tmp_path / f"r-seed={seed}" for seed in range(3)]
    until(lambda: all((run / "metrics.jsonl").exists() for run in runs), "all three")
    job = records.read_job(runs[2])  # the last: Slurm gives it the number of the whole array
    assert job is not None
    assert re.fullmatch(r"\d+_2", job.id)
    slurm("scancel", "--signal", "USR2", job.id)
    submitted = [records.read_job(run) for run in runs]
    until(lambda: not any(job and jobs.current_job_state(job) for job in submitted), "the end", 300)
    assert [len(records.read_stops(run)) for run in runs] == [0, 0, 1]
    assert cli.main(["jobs", str(tmp_path)]) == 0
    assert capfd.readouterr().out.count("done") == 3


@pytest.mark.soak
def test_a_job_that_gets_nowhere_ends_after_three_starts(tmp_path: Path) -> None:
    run = submitted(tmp_path, allocation=[*ALLOCATION, "--python", "/bin/false"])
    until(lambda: not run.state, "the end", 300)
    assert {stop.code for stop in records.read_stops(run.folder)} <= {1, 143}  # 143: ended because the other ended
    assert len(records.read_stops(run.folder)) == 3
    status = records.read_status(run.folder)
    assert status is not None
    assert (status.state, status.code) == ("failed", 93)
    assert "error: 3 starts ended at step 0" in run.log


def test_slurms_own_words_about_a_wrong_partition(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["submit", "--partition", "nowhere", "--", *TINY, "--runs", str(tmp_path), "--name", "r"]
    assert cli.main(argv) == 64
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "error: Slurm refused the job: " in said
    assert "invalid partition" in said.lower()
    assert shutil.which("sbatch")
