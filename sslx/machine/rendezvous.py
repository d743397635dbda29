"""How ranks find each other at a key-value store: each wait has a limit, and its error names the missing ranks."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeVar

from sslx.console.words import first_of
from sslx.errors import RanksError
from sslx.machine import environment, network

REPORT_EVERY_S = 20.0
"""Seconds of waiting between two lines that name the missing ranks."""
STORE_TIMEOUT_S = 30.0
"""Seconds to wait for the answer of a listener; a real store answers sooner."""


class Store(Protocol):
    """The part of torch's store that is used here.  Every call raises RuntimeError if it fails or takes too long."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


S = TypeVar("S", bound=Store)
T = TypeVar("T")
Connect: TypeAlias = Callable[[str, int, socket.socket | None], S]
"""A function that connects to the store at an address or, with a listening socket, creates the store."""


class Board:
    """A board on which every rank writes a line and all ranks can read, whatever their collectives wait for.

    Each board has its own connection, so that a thread can use it.  Methods raise ConnectionError if the store does
    not answer.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._prefix, self._num_waits = store, prefix, 0
        self.hosts = self._read("host", range(world_size))

    def addresses(self) -> list[str]:
        """Return the address from which each rank reaches the store, or "" if it is unknown."""
        return self._read("address", range(self.world_size))

    def write(self, line: str) -> None:
        """Replace this rank's line."""
        self._ask(lambda: self._store.set(f"{self._prefix}/line/{self.rank}", line))

    def wait_for_main(self) -> None:
        """Wait until rank 0 makes the same call, counted from the start.  Raise RanksError if the store ends."""
        self._num_waits += 1
        mark = f"{self._prefix}/main/{self._num_waits}"
        try:
            if self.rank == 0:
                self._ask(lambda: self._store.set(mark, "1"))
            while not self._ask(lambda: self._store.check([mark])):
                time.sleep(0.1)
        except ConnectionError as error:
            raise RanksError("the store of the ranks has ended, because rank 0 has left") from error

    def read(self, ranks: range) -> list[str]:
        """Return the lines of these ranks, "" for one that has not written any."""
        return self._read("line", ranks)

    def _read(self, kind: str, ranks: range) -> list[str]:
        values = self._ask(lambda: self._store.multi_get([f"{self._prefix}/{kind}/{rank}" for rank in ranks]))
        return [value.decode(errors="replace") for value in values]

    def _ask(self, request: Callable[[], T]) -> T:
        try:
            return request()
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error


def meet(connect: Connect[S], rank: int, world_size: int, limit_s: float) -> tuple[S, str, Board]:
    """Wait for all ranks; return their store, the prefix of this meeting's keys in it, and the ranks' board.

    Rank 0 hosts the store, unless torchrun's agent or sslx's launcher does.  Raise RanksError if a rank does not come
    within the limit or the port is taken, and ConfigError for an invalid address.
    """
    host, port = environment.meeting_point(os.environ)
    network.resolve(host)
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    wait = Waiting(f"{host}:{port}", rank, limit_s)
    if rank == 0 and not is_hosted:
        store = connect(host, port, network.bind(port))
    else:
        hosts = "the launcher" if is_hosted else "rank 0"
        wait.until(lambda: "" if network.is_listening(host, port) else f"{hosts} of {world_size} ranks")
        store = _connect_in_time(lambda: connect(host, port, None), wait)
    base = f"sslx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        prefix = f"{base}/{store.add(f'{base}/start/{rank}', 1)}"  # a process may leave and join again
        store.set(f"{prefix}/line/{rank}", "")
        store.set(f"{prefix}/host/{rank}", socket.gethostname())
        store.set(f"{prefix}/address/{rank}", network.source_address(host))
        if store.add(f"{prefix}/ranks", 1) >= world_size:
            store.set(f"{prefix}/complete", "1")
    except RuntimeError as error:
        raise RanksError(
            f"the listener at {wait.address} (MASTER_ADDR, MASTER_PORT) is not rank 0 of this job: set a free port"
        ) from error

    def missing() -> str:
        if store.check([f"{prefix}/complete"]):
            return ""
        late = [str(r) for r in range(world_size) if not store.check([f"{prefix}/host/{r}"])]
        return f"{'rank' if len(late) == 1 else 'ranks'} {first_of(late, 8)} of {world_size}"

    try:
        wait.until(missing)
        board = Board(_connect_in_time(lambda: connect(host, port, None), wait), prefix, rank, world_size)
        return store, prefix, board
    except RuntimeError as error:
        raise RanksError(
            f"the store at {wait.address} (MASTER_ADDR, MASTER_PORT) has ended, because rank 0 has left"
        ) from error


def _connect_in_time(connect: Callable[[], S], wait: "Waiting") -> S:
    """Return the connected store.  Raise RanksError if the listener is not a store: torch would wait forever."""
    stores: list[S] = []

    def try_to_connect() -> None:
        with suppress(RuntimeError):
            stores.append(connect())

    thread = threading.Thread(target=try_to_connect, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT_S)
    if not stores:
        raise RanksError(
            f"the listener at {wait.address} (MASTER_ADDR, MASTER_PORT) is not rank 0: set MASTER_PORT to a free port"
        )
    return stores[0]


class Waiting:
    """A wait for several conditions with one limit, which reports from time to time what is missing."""

    def __init__(self, address: str, rank: int, limit_s: float) -> None:
        self.address = address
        self._is_main = rank == 0
        self._limit_s, self._started = limit_s, time.monotonic()
        self._last_report = self._started

    def until(self, missing: Callable[[], str]) -> None:
        """Wait until ``missing`` returns "".  After the limit, raise RanksError with what it returned last."""
        pause_s = 0.01
        while names := missing():
            now = time.monotonic()
            if now - self._started > self._limit_s:
                raise RanksError(
                    f"waited {self._limit_s:g} s for {names} at {self.address} (MASTER_ADDR, MASTER_PORT): check that "
                    "they were started and can reach that address; SSLX_JOIN_S sets the limit in seconds"
                )
            if now - self._last_report > REPORT_EVERY_S:
                self._last_report = now
                if self._is_main or not names.startswith("ranks"):
                    sys.stderr.write(f"waiting for {names} at {self.address} ({now - self._started:.0f} s)\n")
                    sys.stderr.flush()
            time.sleep(pause_s)
            pause_s = min(0.5, 1.5 * pause_s)
