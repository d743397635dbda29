"""``sslx pretrain`` stopped from outside: signals, a closed pipe, a killed rank or launcher."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from kit.processes import LONG, SSLX, children, is_one_line, pretrain, said, started, until, until_training
from kit.runs import Run, status_of, steps_of
from sslx.machine import compiler
from sslx.runs import checkpoint


def ended_as(folder: Path, state: str, reason: str) -> None:
    status = status_of(folder)
    assert (status.state, status.reason) == (state, reason)


@pytest.mark.slow
def test_sigterm_saves_and_a_resumed_run_finishes(here: Run, tmp_path: Path):
    steps = ["--steps", "200", "--checkpoint.every", "0", "--optim.lr", "0.01"]
    with started(tmp_path, *steps) as process:
        until_training(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 75
    assert said(tmp_path) == ""
    ended_as(tmp_path, "preempted", "SIGTERM")
    reached = status_of(tmp_path).step
    assert 2 <= reached < 200
    assert checkpoint.load(tmp_path / "r")["step"] == reached
    assert steps_of(tmp_path)[-1] == reached
    assert here(*steps, "--resume", "auto") == (0, "")
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("done", 200)
    assert steps_of(tmp_path) == list(range(1, 201))


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
    ended_as(tmp_path, "stopped", "SIGINT")


@pytest.mark.slow
def test_an_output_that_nothing_reads_ends_the_run_and_its_status_says_so(tmp_path: Path):
    """sslx pretrain ... | head -1"""
    argv = [*SSLX, *pretrain(tmp_path, *LONG)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while not (line := process.stdout.readline()).startswith("step "):
            assert line, "it ended"
        process.stdout.close()
        assert process.wait(100) == 141
        is_one_line(process.stderr.read(), "nothing reads the output")
    assert (status_of(tmp_path).state, "closed pipe" in status_of(tmp_path).reason) == ("failed", True)


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
    ended_as(tmp_path, "failed", "another rank exited without reporting an error")
