"""Stop signals: a flag that is set while the main thread is busy, and handlers that are put back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from processes import until
from sslx.train.signals import STOPPING, StopSignals, exit_code, give_up_s


def send(number: signal.Signals, stop: StopSignals) -> None:
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 5
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.001)


@contextmanager
def once_ready(code: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A process that runs this code and has said "ready", and what reads its next line."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
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


def test_other_signals_stop_nothing():
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            assert stop.received == 0
            send(signal.SIGTERM, stop)
            assert stop.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGUSR1, previous)


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
        "import ctypes, threading, time\n"
        "from sslx.train.signals import StopSignals\n"
        "def report():\n"
        "    while not stop.received: time.sleep(0.01)\n"
        "    print('received', stop.received, flush=True)\n"
        "with StopSignals() as stop:\n"
        "    threading.Thread(target=report, daemon=True).start()\n"
        "    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while True: end = libc.sleep(60)\n"
    )
    with once_ready(native) as (process, line):
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert line() == f"received {signal.SIGINT.value}\n"
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def test_ctrl_c_ends_with_130_and_a_preemption_with_75():
    assert exit_code(signal.SIGINT) == 130
    assert exit_code(signal.SIGTERM) == exit_code(signal.SIGUSR2) == 75


def test_a_run_that_cannot_agree_is_given_up_and_says_so_first():
    stuck = (
        "import ctypes\n"
        "from sslx.train.signals import StopSignals\n"
        "with StopSignals(give_up_s=0.3) as stop:\n"
        "    stop.on_give_up = lambda: print('giving up', stop.received, flush=True)\n"
        "    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while True: libc.sleep(60)\n"
    )
    with once_ready(stuck) as (process, line):
        process.send_signal(signal.SIGUSR2)
        assert line() == f"giving up {signal.SIGUSR2.value}\n"
        assert process.wait(60) == 75


def test_a_run_that_has_agreed_may_take_its_time():
    def waiting() -> bool:
        return any(thread.name == "give up" for thread in threading.enumerate())

    with StopSignals(give_up_s=60) as stop:
        send(signal.SIGTERM, stop)
        assert stop.heed(0) == 0
        until(waiting, "the thread that would give up", 5)
        assert stop.heed(stop.received) == signal.SIGTERM
        until(lambda: not waiting(), "its end", 5)
    with StopSignals(give_up_s=60) as stop:  # ended by itself before the time was up
        send(signal.SIGTERM, stop)
        until(waiting, "the thread that would give up", 5)
    until(lambda: not waiting(), "its end", 5)


def test_ctrl_c_gives_up_nothing():
    with StopSignals(give_up_s=0.05) as stop:
        stop.on_give_up = lambda: os._exit(1)
        send(signal.SIGINT, stop)
        time.sleep(0.2)


def test_only_a_cluster_is_in_a_hurry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SSLX_GIVE_UP_S", raising=False)
    assert give_up_s() == float("inf")
    monkeypatch.setenv("SSLX_GIVE_UP_S", "40")
    assert give_up_s() == 40
