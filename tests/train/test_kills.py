"""Runs that are killed and stopped at random moments, many times over: nothing is lost, nothing is done twice."""

import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kit.checkpoints import equal
from kit.processes import Record, children, ended, started, until
from kit.runs import steps_of
from sslx.runs import checkpoint, records

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
STEPS = ["--source.name", "digits", "--data.backend", "dali", "--data.threads", "1", "--optim.lr", "0.01"]
"""Real images through DALI."""


def run_to_the_end(folder: Path, *flags: str) -> Any:
    """The weights of a run that nobody disturbs."""
    with started(folder, *STEPS, *flags) as process:
        assert process.wait(600) == 0, (folder / "err").read_text()
    return checkpoint.load(folder / "r")["method"]


def test_sigkill_at_random_moments(tmp_path: Path, record_property: Record):
    """50 starts are killed: a third while they start, the others while they train and save, which is every 5 steps."""
    flags = ["--steps", "3000", "--checkpoint.every", "5", "--checkpoint.keep", "2", "--log.every", "1"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    truth = run_to_the_end(calm, *flags)
    moments, lost = random.Random(), list[int]()
    before = 0
    for number in range(50):
        with started(killed, *STEPS, *flags, "--resume", "auto") as process:
            if number % 3:
                until_training_again(killed, process, before)
                time.sleep(moments.uniform(0, 0.7))
            else:
                time.sleep(moments.uniform(0, 6))
            process.kill()
            process.wait(60)
        before = records.newest_step(killed / "r")
        lost.append(max(0, last_step(killed) - before))
    assert equal(run_to_the_end(killed, *flags, "--resume", "auto"), truth)
    assert steps_of(killed) == list(range(1, 3001))
    assert max(lost) < 10  # a save each 5 steps, of which one may have been on its way
    record_property(
        "figure", f"50 kills; at most {max(lost)} steps lost, weights bit for bit those of an undisturbed run"
    )


def last_step(folder: Path) -> int:
    try:
        lines = (folder / "r" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    return sum(line.endswith(b"\n") for line in lines)


def until_training_again(folder: Path, process: Any, before: int) -> None:
    until(lambda: last_step(folder) > before or process.poll() is not None, "a step more")


@pytest.mark.parametrize("signals", [["SIGTERM"], ["SIGUSR2"], ["SIGINT"], ["SIGUSR2", "SIGTERM"], ["SIGHUP"]])
def test_stopping_signals_at_random_moments(signals: list[str], tmp_path: Path, record_property: Record):
    """Twelve starts of 2 ranks: the exit code is one of the documented ones, and no process and no step is lost."""
    moments, codes, waits, reached = random.Random(), Counter[int](), list[float](), 0
    expected = {"SIGINT": 130}.get(signals[0], 75)
    for _ in range(12):
        flags = ["--steps", "100000", "--checkpoint.every", "0", "--ranks", "2", "--resume", "auto"]
        with started(tmp_path, *STEPS, *flags) as process:
            if moments.random() < 0.6:
                until_training_again(tmp_path, process, reached)
                time.sleep(moments.uniform(0, 0.5))
            else:
                time.sleep(moments.uniform(0.3, 5))  # before that, Python itself has no handlers yet
            ranks = children(process.pid)
            sent = time.monotonic()
            for name in signals:
                process.send_signal(getattr(signal, name))
                time.sleep(0.05)
            codes[process.wait(60)] += 1
            waits.append(time.monotonic() - sent)
        until(lambda ranks=ranks: all(map(ended, ranks)), "no rank left", 30)
        assert "Traceback" not in (tmp_path / "err").read_text()
        steps = steps_of(tmp_path) if (tmp_path / "r/metrics.jsonl").exists() else []
        assert steps == list(range(1, len(steps) + 1))
        status = records.read_status(tmp_path / "r")
        assert status is None or status.step == records.newest_step(tmp_path / "r") == len(steps)
        reached = len(steps)
    assert set(codes) == {expected}
    record_property(
        "figure", f"exit code {expected} of 12; from signal to end {sorted(waits)[6]:.1f} s, at most {max(waits):.1f} s"
    )
