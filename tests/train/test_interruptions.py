"""``sslx pretrain`` stopped from outside: signals, a closed pipe, a killed rank or launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.processes import LONG, TINY, children, is_one_line, metrics, outside, said, started, until, until_training
from sslx.machine import compiler
from sslx.runs import checkpoint, records

Run = Callable[..., tuple[int, str]]


def test_sigterm_saves_and_a_resumed_run_finishes(here: Run, tmp_path: Path):
    steps = ["--steps", "200", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 75
    assert said(tmp_path) == ""
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    assert 2 <= status.step < 200
    assert checkpoint.load(tmp_path / "r")["step"] == status.step
    assert metrics(tmp_path / "r")[-1]["step"] == status.step
    assert here(*steps, "--resume", "auto") == (0, "")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.step) == ("done", 200)
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 201))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_ends_with_130(tmp_path: Path, ranks: int):
    with started(tmp_path, *LONG, "--ranks", str(ranks)) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 130
    assert said(tmp_path) == ""
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "SIGINT")
    assert checkpoint.load(tmp_path / "r")["step"] == status.step


@pytest.mark.slow
@pytest.mark.skipif(compiler.find_cpp() is None, reason="Inductor needs a C++ compiler")
def test_ctrl_c_in_the_first_step_also_ends_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A terminal's Ctrl-C reaches g++ as well, whose failure is no error then."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with started(tmp_path, *LONG, "--compile", "on") as process:
        look = ["pgrep", "--pgroup", str(process.pid), "cc1plus"]
        until(lambda: subprocess.run(look, stdout=subprocess.DEVNULL, check=False).returncode == 0, "g++")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(100) == 130
    assert said(tmp_path) == ""
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("stopped", "SIGINT")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_a_long_step_at_once(tmp_path: Path, ranks: int):
    """One step of 2,048 micro-batches takes half a minute; the second Ctrl-C does not wait for it."""
    endless = "--source.num-samples 4096 --batch-size 4096 --num-micro-batches 1024 --steps 1".split()
    with started(tmp_path, *endless, "--ranks", str(ranks)) as process:
        until(lambda: "1 step of 4096" in (tmp_path / "out").read_text(), "start")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.wait(100) == 130
        assert time.monotonic() - start < 10
        until(lambda: not children(process.pid), "end of the ranks", 5)
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "step 1/1" not in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_an_output_that_nothing_reads_ends_the_run_and_its_status_says_so(tmp_path: Path):
    """sslx pretrain ... | head -1"""
    argv = [sys.executable, "-m", "sslx", "pretrain", *TINY, *LONG, "--runs", str(tmp_path), "--name", "r"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not (line := process.stdout.readline()).startswith("step "):
            assert line, "it ended"
        process.stdout.close()
        assert process.wait(100) == 141
        is_one_line(process.stderr.read(), "nothing reads the output")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, "closed pipe" in status.reason) == ("failed", True)


@pytest.mark.slow
def test_killing_one_of_two_ranks_ends_the_job_with_one_line(tmp_path: Path):
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        said = [line.split()[1] for line in (tmp_path / "out").read_text().splitlines()]
        assert len(set(said)) == len(said)  # "1/1000000", ...: each step once, from rank 0
        ranks = children(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        code = process.wait(100)
    assert code == 137
    is_one_line((tmp_path / "err").read_text(), "another rank exited")
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("failed", "another rank exited without reporting an error")


@pytest.mark.slow
def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path):
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        ranks = children(process.pid)
        assert len(ranks) == 2
        process.kill()
        process.wait()
        until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), "end of the ranks", 10)


@pytest.mark.slow
def test_two_ranks_are_preempted_together_and_resume(tmp_path: Path):
    steps = ["--ranks", "2", "--steps", "60", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 75
    status = records.read_status(tmp_path / "r")
    assert status is not None
    assert (status.state, status.reason) == ("preempted", "SIGTERM")
    code, out, err = outside(tmp_path, *steps, "--resume", "auto")
    assert (code, err) == (0, "")
    assert f"at step {status.step}" in out
    assert [line["step"] for line in metrics(tmp_path / "r")] == list(range(1, 61))
