"""Ranks that stop or hang, and signals at odd moments: the run ends, says who was late, and leaves no process."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.processes import LONG, Record, children, ended, is_one_line, pretrain, said, started, until, until_training
from kit.runs import status_of
from kit.screen import sslx_on_a_terminal
from kit.sources import noise
from sslx.runs import records

EVERY = ["--steps", "1000000", "--checkpoint.every", "2", "--optim.lr", "0.01"]


def pids(launcher: int) -> list[int]:
    """The ranks, and what they have started."""
    ranks = children(launcher)
    return ranks + [pid for rank in ranks for pid in children(rank)]


# ---------------------------------------------------------------- a stopped rank


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_one_signal_ends_the_run(
    tmp_path: Path, number: signal.Signals, code: int, victim: int, monkeypatch: pytest.MonkeyPatch,
    record_property: Record,
):  # fmt: skip
    monkeypatch.setenv("SSLX_GIVE_UP_S", "8")
    with started(tmp_path, *EVERY, "--ranks", "2") as process:
        until_training(tmp_path, process)
        until(lambda: (tmp_path / "r" / "checkpoints" / "step_2" / "manifest.json").exists(), "a checkpoint")
        ranks = pids(process.pid)
        os.kill(children(process.pid)[victim], signal.SIGSTOP)
        process.send_signal(number)
        sent = time.monotonic()
        assert process.wait(100) == code
        seconds = time.monotonic() - sent
        assert all(ended(pid) for pid in ranks)
    record_property("figure", f"rank {victim}, {number.name}: exit code {code} after {seconds:.0f} s, 0 processes left")
    is_one_line(
        (tmp_path / "err").read_text(),
        f"error: {number.name}; rank {victim} on ",
        "does not answer",
        "no step ended in 8 s",
    )
    status = status_of(tmp_path)
    assert (status.state, status.code) == ("stopped" if code == 130 else "preempted", code)
    assert f"rank {victim} on " in status.reason
    assert (tmp_path / "r" / "checkpoints" / f"step_{status.step}").exists()


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_stopped_rank_at_once(tmp_path: Path, record_property: Record):
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        ranks = pids(process.pid)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        until(lambda: "press Ctrl-C again to end now" in (tmp_path / "out").read_text(), "the answer")
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        started_s = time.monotonic()
        assert process.wait(100) == 130
        seconds = time.monotonic() - started_s
        assert seconds < 25, "not after the 30 s of giving up"
        record_property("figure", f"exit code 130 after {seconds:.1f} s, 0 processes left")
        assert all(ended(pid) for pid in ranks)
    assert said(tmp_path) == ""


@pytest.mark.slow
def test_all_ranks_stopped_are_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSLX_GIVE_UP_S", "2")
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        ranks = pids(process.pid)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(100) == 75
        assert all(ended(pid) for pid in ranks)
    assert "all ranks are stopped" in (tmp_path / "err").read_text()


@pytest.mark.slow
def test_a_collective_that_one_rank_does_not_reach_ends_by_itself_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SSLX_STALL_S", "12")
    with started(tmp_path, *LONG, "--ranks", "2") as process:
        until_training(tmp_path, process)
        os.kill(children(process.pid)[1], signal.SIGSTOP)
        assert process.wait(200) == 70
    is_one_line((tmp_path / "err").read_text(), "has not ended for", "rank 1 on ", "SSLX_STALL_S")
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("failed", 70)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killing_it_leaves_no_loader_worker(tmp_path: Path, ranks: int):
    """SIGKILL of the launcher, and of a rank that is its own."""
    images = noise(tmp_path / "images", 32)
    folder = ["--source.name", "folder", "--source.root", images, "--data.backend", "torchvision"]
    with started(tmp_path, *LONG, *folder, "--data.threads", "2", "--ranks", str(ranks)) as process:
        until_training(tmp_path, process)
        below = pids(process.pid)
        assert len(below) > ranks
        process.kill()
        process.wait()
        until(lambda: all(ended(pid) for pid in below), "their end", 20)


# ---------------------------------------------------------------- other signals


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_closes_saves_the_run(tmp_path: Path, ranks: int):
    """Its end is a SIGHUP to the session's processes, and errors for whoever writes to it."""
    with sslx_on_a_terminal(*pretrain(tmp_path, *LONG, "--ranks", str(ranks))) as terminal:
        terminal.until(lambda sent: re.search(r"step +([2-9]|\d\d+)/", sent), "step 2")
        assert terminal.hang_up() == 75
    assert (status_of(tmp_path).state, status_of(tmp_path).reason) == ("preempted", "SIGHUP")
    assert (tmp_path / "r" / "checkpoints" / f"step_{status_of(tmp_path).step}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_of_cpu_time_saves_the_run(tmp_path: Path, ranks: int):
    """Beyond the soft limit the system sends SIGXCPU once a second; with two ranks only one of them gets it."""
    with started(tmp_path, *LONG, "--ranks", str(ranks)) as process:
        until_training(tmp_path, process)
        limited = children(process.pid)[-1] if ranks > 1 else process.pid
        resource.prlimit(limited, resource.RLIMIT_CPU, (1, resource.RLIM_INFINITY))
        assert process.wait(100) == 75
    assert (status_of(tmp_path).state, status_of(tmp_path).reason) == ("preempted", "SIGXCPU")
    assert (tmp_path / "r" / "checkpoints" / f"step_{status_of(tmp_path).step}").exists()
    assert said(tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigusr1_asks_where_the_run_stands_and_nohup_outlives_the_terminal(tmp_path: Path, ranks: int):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the run inherits, as from nohup
    try:
        with started(tmp_path, *LONG, "--ranks", str(ranks)) as process:
            signal.signal(signal.SIGHUP, previous)
            until_training(tmp_path, process)
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGHUP)
            until(lambda: "s since the last step" in (tmp_path / "out").read_text(), "the answer")
            before = status_of(tmp_path).time
            steps = (tmp_path / "out").read_text().count("\nstep ")
            until(lambda: (tmp_path / "out").read_text().count("\nstep ") > steps + 3, "further steps")
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(100) == 75
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert status_of(tmp_path).reason == "SIGTERM"
    assert status_of(tmp_path).time > before
    assert (tmp_path / "out").read_text().count("s since the last step") == 1


# ---------------------------------------------------------------- the first and the last moments

FIRST_LINE = (
    "import os, sys\n"
    "from sslx.__main__ import main\n"
    "from sslx.machine import interrupts\n"
    "begin = interrupts.begin\n"
    "def telling(saves):\n"
    "    begin(saves)\n"
    "    os.write(1, b'ready\\n')\n"
    "interrupts.begin = telling\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR2: 75, signal.SIGHUP: 75}


def told_to_end(folder: Path, number: signal.Signals, delay_s: float, *flags: str) -> str:
    """What a run says that gets the signal so long after its first line."""
    argv = [sys.executable, "-c", FIRST_LINE, *pretrain(folder, *LONG, *flags)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        below = pids(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=100)
        assert process.returncode == CODES[number], (delay_s, err)
        until(lambda: all(ended(pid) for pid in below), "their end", 10)
    assert "Traceback" not in err
    assert err.count("\n") <= 1, err
    return err


@pytest.mark.parametrize("delay_s", [0.0, 0.6])
@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_it_starts_is_one_line_and_its_code(tmp_path: Path, number: signal.Signals, delay_s: float):
    """From the first line of sslx on.  Where the delay meets it depends on the machine; the end does not."""
    err = told_to_end(tmp_path, number, delay_s)
    assert "interrupted" in err or "step " in err or not err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_launcher_that_is_told_to_end_at_any_moment_ends_in_good_order(tmp_path: Path, number: signal.Signals):
    state = "stopped" if number == signal.SIGINT else "preempted"
    for delay_s in (0.0, 0.2, 1.0, 2.0, 3.0, 5.0, 8.0):
        told_to_end(tmp_path / str(delay_s), number, delay_s, "--ranks", "2")
        status = records.read_status(tmp_path / str(delay_s) / "r")
        assert status is None or (status.state, status.code) == (state, CODES[number])


@pytest.mark.slow
def test_a_signal_after_the_outcome_changes_nothing(tmp_path: Path):
    """From the moment on that status.json says "done", until the process is gone: many, to meet all of its end."""
    with started(tmp_path, "--steps", "2") as process:
        until(lambda: (tmp_path / "r" / "status.json").exists() and status_of(tmp_path).state == "done", "the end")
        while process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                process.send_signal(number)
            time.sleep(0.001)
    assert process.returncode == 0
    assert said(tmp_path) == ""
    assert (status_of(tmp_path).state, status_of(tmp_path).code) == ("done", 0)
