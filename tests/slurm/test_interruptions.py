"""Runs on two nodes of a real Slurm, disturbed, and what comes of them: the weights of an undisturbed run, bitwise.

The scenarios are S1 to S8 of what preemption, limits, node failures, crashes and hangs do to jobs elsewhere.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from on_slurm import ALLOCATION, ROOT, SMALL, STEPS, Run, equal, slurm, submitted
from processes import TINY, until
from sslx import cli, outcome

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]
Weights = dict[str, torch.Tensor]


def is_undisturbed(run: Run, reference: Weights, repeated: int = 0) -> None:
    """It is done, with the weights of the reference, and has repeated so many steps at most."""
    status = run.finish()
    assert (status.state, status.step) == ("done", STEPS), run.log
    run.is_complete()
    assert equal(run.weights(), reference)
    assert run.repeated() <= repeated, run.log


@pytest.mark.parametrize("name", ["TERM", "USR2"])
def test_s1_a_signal_loses_no_step(name: str, tmp_path: Path, reference: Weights) -> None:
    run = submitted(tmp_path, "--checkpoint.every", "0")
    run.until_step(20)
    run.signal(name)
    if name == "TERM":
        run.signal("USR2")  # as submitit's tests have it: one after the other
    is_undisturbed(run, reference)
    (stop,) = outcome.read_stops(run.folder)
    assert (stop.code, stop.reason, stop.step >= 20) == (75, f"SIG{name}", True)
    assert f"resumed {run.folder} at step {stop.step}" in run.log


def test_s2_a_preempted_job_goes_on_after_the_other(tmp_path: Path, reference: Weights) -> None:
    run = submitted(tmp_path, "--checkpoint.every", "0")
    run.until_step(20)
    slurm(
        "sbatch",
        "--partition",
        "high",
        "--nodes",
        "2",
        "--exclusive",
        "--output",
        "/dev/null",
        "--wrap",
        "srun sleep 1",
    )
    is_undisturbed(run, reference)
    (stop,) = outcome.read_stops(run.folder)
    assert (stop.reason, stop.step >= 20) == ("SIGTERM", True)


def test_s3_the_time_limit_is_no_end(tmp_path: Path) -> None:
    """Slurm looks at limits every 30 s: it asks 40 to 60 s before a minute is over."""
    allocation = [*ALLOCATION, "--time", "1", "--signal-delay-s", "40"]
    run = submitted(tmp_path, "--steps", "100000", "--checkpoint.every", "0", allocation=allocation)
    until(lambda: bool(outcome.read_stops(run.folder)), "the limit", 90)
    (stop,) = outcome.read_stops(run.folder)
    assert (stop.code, stop.reason) == (75, "SIGUSR2")
    run.until_step(stop.step + 5)
    assert run.repeated() == 0
    assert cli.main(["cancel", str(run.folder)]) == 0


def test_s4_a_failed_node_costs_no_step_where_the_other_lives(tmp_path: Path, reference: Weights) -> None:
    run = submitted(tmp_path, "--checkpoint.every", "10")
    run.until_step(20)
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: run.state.startswith("waiting"), "requeue")
    slurm("scontrol", "update", "nodename=n2", "state=resume")
    is_undisturbed(run, reference, repeated=10)


def test_s5_a_killed_rank_starts_the_job_again(tmp_path: Path, reference: Weights) -> None:
    run = submitted(tmp_path, "--checkpoint.every", "10")
    run.until_step(25)
    os.kill(run.rank(1), signal.SIGKILL)
    is_undisturbed(run, reference, repeated=30)
    (stop,) = outcome.read_stops(run.folder)
    assert stop.step >= 20


def test_s6_a_hanging_rank_is_given_up(tmp_path: Path, reference: Weights) -> None:
    run = submitted(tmp_path, "--checkpoint.every", "10")
    run.until_step(25)
    os.kill(run.rank(1), signal.SIGSTOP)
    time.sleep(0.5)
    run.signal("USR2")
    is_undisturbed(run, reference, repeated=30)
    (stop,) = outcome.read_stops(run.folder)
    assert stop.reason == "SIGUSR2; no step ended in 6 s"


def test_s7_torchrun_without_submitit_is_preempted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Weights
) -> None:
    monkeypatch.chdir(ROOT)
    given = {"NAME": "r", "RUNS": str(tmp_path), "RANKS": "1", "SSLX_GIVE_UP_S": "6"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    asked = ["sbatch", "--parsable", "--nodes", "2", "--partition", "low", "--cpus-per-task", "1", "--output"]
    job = slurm(
        *asked, f"{tmp_path}/job.log", "slurm/pretrain.sbatch", "simclr_digits", *SMALL, "--checkpoint.every", "0"
    )
    record = outcome.Job(cluster="slurm", id=job, log=f"{tmp_path}/job.log", code="", submitted=0.0)
    run = Run(tmp_path / "r", record)
    run.until_step(20)
    run.signal("USR2")
    is_undisturbed(run, reference)
    (stop,) = outcome.read_stops(run.folder)
    assert (stop.code, stop.reason, stop.step >= 20) == (75, "SIGUSR2", True)


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
    job = outcome.read_job(runs[1])
    assert job is not None
    assert re.fullmatch(r"\d+_1", job.id)
    slurm("scancel", "--signal", "USR2", job.id)
    done = [None, None, None]

    def ended() -> bool:
        done[:] = [outcome.read_status(run) for run in runs]
        return all(status is not None and status.state == "done" for status in done)

    until(ended, "the end", 120)
    assert [len(outcome.read_stops(run)) for run in runs] == [0, 1, 0]
    assert cli.main(["jobs", str(tmp_path)]) == 0
    assert capfd.readouterr().out.count("done") == 3


def test_a_job_that_gets_nowhere_ends_after_three_starts(tmp_path: Path) -> None:
    run = submitted(tmp_path, allocation=[*ALLOCATION, "--python", "/bin/false"])
    until(lambda: not run.state, "the end", 90)
    assert [stop.code for stop in outcome.read_stops(run.folder)] == [1, 1, 1]
    status = outcome.read_status(run.folder)
    assert status is not None
    assert (status.state, status.code) == ("failed", 93)
    assert "error: 3 starts ended at step 0" in run.log


def test_cancelling_saves_and_is_not_requeued(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = submitted(tmp_path, "--steps", "100000", "--checkpoint.every", "0")
    run.until_step(5)
    capfd.readouterr()
    assert cli.main(["cancel", str(run.folder)]) == 0
    said = capfd.readouterr()
    saved = outcome.newest_step(run.folder)
    assert saved >= 5
    assert f"can go on at step {saved}" in said.out
    time.sleep(1)
    assert not run.state
    assert slurm("scontrol", "show", "job", run.job.id, "-o").count("Requeue=1 Restarts=0")


def test_slurms_own_words_about_a_wrong_partition(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["submit", "--partition", "nowhere", "--", *TINY, "--runs", str(tmp_path), "--name", "r"]
    assert cli.main(argv) == 64
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "error: Slurm refused the job: " in said
    assert "invalid partition" in said.lower()
    assert shutil.which("sbatch")
