"""How ranks find each other: at a store of keys and values, each wait within a limit, with who is missing by name."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeAlias, TypeVar

from sslx.errors import RanksError
from sslx.machine import environment, network

WAITING_S = 20.0
"""After so many seconds of waiting, and again and again, a line says for whom."""
ANSWER_S = 30.0
"""A store answers sooner, if what listens is one."""


class Store(Protocol):
    """What is used of torch's: every call raises RuntimeError where it fails or takes too long."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


S = TypeVar("S", bound=Store)
T = TypeVar("T")
Connect: TypeAlias = Callable[[str, int, socket.socket | None], S]
"""What asks the store at that address; with a listening socket, the store itself."""


class Board:
    """A board that every rank writes a line on and all can read, whatever their collectives wait for.

    It has a connection of its own, for a thread.  Raises ConnectionError where the store does not answer.
    """

    def __init__(self, store: Store, prefix: str, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._prefix, self._num_waits = store, prefix, 0
        self.hosts = self._read("host", range(world_size))

    def addresses(self) -> list[str]:
        """The address that each rank reaches the store from; "" where it does not know."""
        return self._read("address", range(self.world_size))

    def write(self, line: str) -> None:
        """Replace this rank's line."""
        self._ask(lambda: self._store.set(f"{self._prefix}/line/{self.rank}", line))

    def wait_for_main(self) -> None:
        """Wait until rank 0 calls this too; the n-th call of one is that of all.  RanksError where the store ends."""
        self._num_waits += 1
        mark = f"{self._prefix}/main/{self._num_waits}"
        try:
            if self.rank == 0:
                self._ask(lambda: self._store.set(mark, "1"))
            while not self._ask(lambda: self._store.check([mark])):
                time.sleep(0.1)
        except ConnectionError as error:
            raise RanksError("the store of the ranks has ended: rank 0 has left") from error

    def read(self, ranks: range) -> list[str]:
        """The lines of these ranks; "" of one that has written none."""
        return self._read("line", ranks)

    def _read(self, what: str, ranks: range) -> list[str]:
        values = self._ask(lambda: self._store.multi_get([f"{self._prefix}/{what}/{rank}" for rank in ranks]))
        return [value.decode(errors="replace") for value in values]

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error


def meet(connect: Connect[S], rank: int, world_size: int, limit_s: float) -> tuple[S, str, Board]:
    """A store that all ranks have come to, the prefix of this meeting's keys in it, and the ranks' board.

    Rank 0 holds the store, unless torchrun's agent or our launcher does.  RanksError where a rank has not come within
    the limit, or the port is taken; ConfigError for an address that is none.
    """
    host, port = environment.meeting_point(os.environ)
    network.resolve(host)
    is_held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    wait = Waiting(f"{host}:{port}", rank, limit_s)
    if rank == 0 and not is_held:
        store = connect(host, port, network.bind(port))
    else:
        holder = "the launcher" if is_held else "rank 0"
        wait.until(lambda: "" if network.answers(host, port) else f"{holder} of {world_size} ranks")
        store = _within(lambda: connect(host, port, None), wait)
    base = f"sslx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        prefix = f"{base}/{store.add(f'{base}/start/{rank}', 1)}"  # a process may leave and join again
        store.set(f"{prefix}/line/{rank}", "")
        store.set(f"{prefix}/host/{rank}", socket.gethostname())
        store.set(f"{prefix}/address/{rank}", network.source_address(host))
        if store.add(f"{prefix}/ranks", 1) >= world_size:
            store.set(f"{prefix}/complete", "1")
    except RuntimeError as error:
        raise RanksError(f"what answers at {wait.where} (MASTER_ADDR, MASTER_PORT) is no rank 0 of this job") from error

    def missing() -> str:
        if store.check([f"{prefix}/complete"]):
            return ""
        late = [str(r) for r in range(world_size) if not store.check([f"{prefix}/host/{r}"])]
        return f"rank{'s' * (len(late) > 1)} {', '.join(late[:8])}{', ...' * (len(late) > 8)} of {world_size}"

    try:
        wait.until(missing)
        return store, prefix, Board(_within(lambda: connect(host, port, None), wait), prefix, rank, world_size)
    except RuntimeError as error:
        raise RanksError(f"the store at {wait.where} (MASTER_ADDR, MASTER_PORT) has ended: rank 0 has left") from error


def _within(connect: Callable[[], S], wait: "Waiting") -> S:
    """The connected store.  RanksError where what listens is no store: torch would wait for its answer for ever."""
    stores: list[S] = []

    def try_it() -> None:
        with suppress(RuntimeError):
            stores.append(connect())

    trying = threading.Thread(target=try_it, daemon=True)
    trying.start()
    trying.join(ANSWER_S)
    if not stores:
        raise RanksError(f"what answers at {wait.where} (MASTER_ADDR, MASTER_PORT) is no rank 0: set a free port")
    return stores[0]


class Waiting:
    """A wait with a limit, over several conditions, that says now and then what is missing."""

    def __init__(self, where: str, rank: int, limit_s: float) -> None:
        self.where = where
        self._speaks = rank == 0
        self._limit_s, self._started = limit_s, time.monotonic()
        self._told = self._started

    def until(self, missing: Callable[[], str]) -> None:
        """Until it returns "".  RanksError with what it returned last, once the limit is over."""
        pause_s = 0.01
        while names := missing():
            now = time.monotonic()
            if now - self._started > self._limit_s:
                raise RanksError(
                    f"waited {self._limit_s:g} s for {names} at {self.where} (MASTER_ADDR, MASTER_PORT): look whether "
                    "they were started and can reach that address; SSLX_JOIN_S sets the seconds"
                )
            if now - self._told > WAITING_S:
                self._told = now
                if self._speaks or not names.startswith("ranks"):
                    sys.stderr.write(f"waiting for {names} at {self.where} ({now - self._started:.0f} s)\n")
                    sys.stderr.flush()
            time.sleep(pause_s)
            pause_s = min(0.5, 1.5 * pause_s)
