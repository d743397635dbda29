"""Stop signals: a flag that is set while the main thread is busy, and handlers that are put back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kit.processes import until
from sslx.errors import ConfigError
from sslx.machine.interrupts import STOPPING, exit_code
from sslx.train.signals import StopSignals, give_up_s


def send(number: signal.Signals, stop: StopSignals) -> None:
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.001)


@contextmanager
def once_ready(code: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A process that runs this code and has said "ready", and what reads its next line."""
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process, process.stdout.readline


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_kept_and_the_handlers_come_back(number: signal.Signals):
    before = [signal.getsignal(n) for n in STOPPING], signal.set_wakeup_fd(-1)
    with StopSignals() as stop:
        assert stop.received == 0
        send(number, stop)
        assert stop.received == number
        send(signal.SIGTERM, stop)
        time.sleep(0.02)
        assert stop.received == number
    assert ([signal.getsignal(n) for n in STOPPING], signal.set_wakeup_fd(-1)) == before


def test_two_interrupts_within_a_second_are_one():
    """The terminal sends Ctrl-C to a rank and the launcher passes its own on: that is one request."""
    with StopSignals() as stop:
        send(signal.SIGINT, stop)
        send(signal.SIGINT, stop)
        time.sleep(0.1)
        assert stop.received == signal.SIGINT


def test_entering_again_and_again_leaves_no_descriptor_open():
    with StopSignals():
        pass
    time.sleep(0.05)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with StopSignals():
            pass
    until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the last thread's end", 5)


def test_it_works_while_the_main_thread_is_in_native_code_and_a_second_ctrl_c_ends_it():
    native = (
        "import ctypes\n"
        "from sslx.train.signals import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    stop.on_stop = lambda: print('received', stop.received, flush=True)\n"
        "    print('ready', flush=True)\n"
        "    while True: ctypes.CDLL(None).sleep(60)\n"
    )
    with once_ready(native) as (process, line):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert line() == f"received {signal.SIGINT.value}\n"
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_a_signal_that_comes_while_a_process_leaves_is_not_said_too():
    slow_to_leave = (
        "import time\n"
        "from sslx.machine import interrupts, proc\n"
        "descendants = proc.descendants\n"
        "proc.descendants = lambda pid: (time.sleep(1), descendants(pid))[1]\n"
        "interrupts.begin(saves=True)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with once_ready(slow_to_leave) as (process, _):
        process.send_signal(signal.SIGUSR2)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "error: interrupted by SIGUSR2 before the first step\n")


def test_ctrl_c_ends_with_130_and_a_preemption_with_75():
    assert exit_code(signal.SIGINT) == 130
    assert exit_code(signal.SIGTERM) == exit_code(signal.SIGUSR2) == exit_code(signal.SIGHUP) == 75
    assert exit_code(signal.SIGXCPU) == 75


STUCK = (
    "import ctypes, time\n"
    "from sslx.train.signals import StopSignals\n"
    "with StopSignals(give_up_s=0.3) as stop:\n"
    "    stop.on_give_up = lambda limit_s: {}\n"
    "    print('ready', flush=True)\n"
    "    while True: ctypes.CDLL(None).sleep(60)\n"
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR2, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_run_that_cannot_agree_is_given_up_and_says_so_first(number: signal.Signals, code: int):
    with once_ready(STUCK.format("print('giving up', stop.received, limit_s, flush=True)")) as (process, line):
        process.send_signal(number)
        assert line() == f"giving up {number.value} 0.3\n"
        assert process.wait(60) == code


def test_a_run_that_has_agreed_may_take_its_time():
    def waiting() -> bool:
        return any(thread.name == "give up" for thread in threading.enumerate())

    with StopSignals(give_up_s=60) as stop:
        send(signal.SIGTERM, stop)
        assert stop.acknowledge(0) == 0
        until(waiting, "the thread that would give up", 5)
        assert stop.acknowledge(stop.received) == signal.SIGTERM
        until(lambda: not waiting(), "its end", 5)
    with StopSignals(give_up_s=60) as stop:  # ended by itself before the time was up
        send(signal.SIGTERM, stop)
        until(waiting, "the thread that would give up", 5)
    until(lambda: not waiting(), "its end", 5)


@pytest.mark.slow
def test_what_is_said_before_giving_up_may_hang_itself():
    """A disk that does not answer.  Ten seconds, and then the end all the same."""
    with once_ready(STUCK.format("time.sleep(1000)")) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75


def test_without_a_word_on_it_the_longest_step_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch):
    """30 seconds and twice the longest step, ten minutes at most; the clock is set forward."""
    for longest_s, limit_s in ((1.0, 32.0), (100.0, 230.0), (1_000.0, 600.0)):
        stop = StopSignals()
        assert stop.limit_s() == 30
        for moment_s in (5.0, 5.0 + longest_s, 6.0 + longest_s):
            monkeypatch.setattr(time, "monotonic", lambda moment_s=moment_s: moment_s)
            stop.acknowledge(0)
        assert stop.limit_s() == limit_s
    assert StopSignals(7).limit_s() == 7


def test_each_sigusr1_asks_and_stops_nothing():
    asked = threading.Semaphore(0)
    with StopSignals() as stop:
        stop.on_query = asked.release
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert asked.acquire(timeout=60)
        assert stop.received == 0
        send(signal.SIGTERM, stop)
        assert stop.received == signal.SIGTERM


def test_the_first_signal_is_answered_once():
    answered = threading.Semaphore(0)
    with StopSignals() as stop:
        stop.on_stop = answered.release
        send(signal.SIGINT, stop)
        send(signal.SIGTERM, stop)
        assert answered.acquire(timeout=60)
        assert not answered.acquire(timeout=0.2)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            send(signal.SIGTERM, stop)
            assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_how_long_to_wait_is_the_environments_to_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SSLX_GIVE_UP_S", raising=False)
    assert give_up_s() is None
    monkeypatch.setenv("SSLX_GIVE_UP_S", "40")
    assert give_up_s() == 40
    for wrong in ("abc", "nan", "-1", "0"):
        monkeypatch.setenv("SSLX_GIVE_UP_S", wrong)
        with pytest.raises(ConfigError, match=r"^expected SSLX_GIVE_UP_S to be a number of seconds above 0, got"):
            give_up_s()
