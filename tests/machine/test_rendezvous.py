"""Ranks that look for each other: they meet, or the one that is missing is named, within the limit."""

import errno
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sslx import distributed
from sslx.errors import ConfigError, RanksError, UserError
from sslx.machine import network, rendezvous


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, which the environment names, as it would for ranks without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return number


def meet(ranks: list[int], world_size: int, limit_s: float = 60) -> dict[int, Any]:
    """What each of these ranks, a thread of its own, gets or raises."""

    def join(rank: int) -> Any:
        try:
            return rendezvous.meet(distributed.connect, rank, world_size, limit_s)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return dict(zip(ranks, threads.map(join, ranks, timeout=100), strict=True))


@pytest.mark.usefixtures("port")
def test_ranks_meet_and_read_each_others_lines():
    results = meet([2, 0, 1], 3)
    boards = {rank: board for rank, (_, _, board) in results.items()}
    assert len({prefix for _, prefix, _ in results.values()}) == 1
    assert boards[1].hosts == [socket.gethostname()] * 3
    boards[2].write("here ✓")
    assert boards[0].read(range(3)) == ["", "", "here ✓"]
    assert boards[1].read(range(2, 3)) == ["here ✓"]


@pytest.mark.usefixtures("port")
def test_who_is_missing_is_named_by_rank_0_and_by_those_who_came():
    results = meet([0, 2], 4, limit_s=0.8)
    for error in results.values():
        assert isinstance(error, RanksError)
        assert error.exit_code == 70
        assert str(error).startswith("waited 0.8 s for ranks 1, 3 of 4 at 127.0.0.1:")


def test_a_rank_0_that_does_not_come_is_named(port: int, capfd: pytest.CaptureFixture[str]):
    error = meet([1], 2, limit_s=0.5)[1]
    assert str(error).startswith(f"waited 0.5 s for rank 0 of 2 ranks at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)")
    assert capfd.readouterr().err == ""  # nothing of torch's


@pytest.mark.usefixtures("port")
def test_those_who_wait_say_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(rendezvous, "REPORT_EVERY_S", 0.2)
    meet([0], 2, limit_s=0.7)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("waiting for rank 1 of 2 at 127.0.0.1:") for line in lines)


def test_a_port_that_is_taken_is_one_line_soon(
    port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert network.BIND_S <= 10
    monkeypatch.setattr(network, "BIND_S", 0.6)
    with socket.create_server(("127.0.0.1", port)):
        error = meet([0], 2)[0]
    assert isinstance(error, RanksError)
    assert str(error).startswith(
        f"expected port {port} (MASTER_PORT) of this machine to be free for rank 0, but it is in use"
    )
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_for_a_moment_only_is_waited_for(port: int):
    taken = socket.create_server(("127.0.0.1", port))
    timer = threading.Timer(0.7, taken.close)
    timer.start()
    results = meet([0, 1], 2)
    assert not any(isinstance(result, UserError) for result in results.values())


ASKING = """
from sslx import distributed
from sslx.machine import rendezvous
rendezvous.STORE_TIMEOUT_S = 1.0
try:
    rendezvous.meet(distributed.connect, 1, 2, 60)
except ValueError as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.mark.soak
def test_something_else_that_listens_is_no_rank_0(port: int):
    """By a process of its own: torch goes on to ask in a thread, and complains of it half a minute later."""
    with socket.create_server(("127.0.0.1", port)):
        with subprocess.Popen([sys.executable, "-c", ASKING], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.kill()
    assert line.startswith(f"RanksError the listener at 127.0.0.1:{port}")


def test_an_address_that_is_none_is_one_line_soon(port: int, monkeypatch: pytest.MonkeyPatch):
    assert network.RESOLVE_S <= 10
    monkeypatch.setattr(network, "RESOLVE_S", 0.3)
    for address in ("no.such.host.invalid", "a..b", "x" * 300):
        monkeypatch.setenv("MASTER_ADDR", address)
        error = meet([1], 2)[1]
        assert isinstance(error, ConfigError)
        assert str(error).startswith("expected MASTER_ADDR to be the address of rank 0's machine, ")
        assert str(port) not in str(error)
        assert "\n" not in str(error)


def test_launchers_at_the_same_moment_have_ports_of_their_own():
    with ThreadPoolExecutor(8) as threads:
        stores = list(threads.map(lambda _: distributed.host_store(), range(8), timeout=60))
    assert len({store.port for store in stores}) == 8
    for store in stores:  # held from the first moment on
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            network.listen("127.0.0.1", store.port)


@pytest.mark.usefixtures("port")
def test_ranks_of_one_store_meet_again_and_again(monkeypatch: pytest.MonkeyPatch):
    store = distributed.host_store()
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    prefixes = [meet([0, 1], 2)[0][1] for _ in range(3)]
    assert len(set(prefixes)) == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert meet([0, 1], 2)[1][1] not in prefixes
