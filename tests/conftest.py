"""Fixtures for all tests: real gloo ranks that stay up between tests, and fresh random numbers."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, Protocol

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import tiers

COLLECTIVE_S = 120.0
"""After this long in one collective a rank gives up by itself."""


class RunOnRanks(Protocol):
    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 200.0
    ) -> list[Any]: ...


class _ByValue:
    """A function of a module that a child cannot import (pytest's importlib mode), sent with its code."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.pickled = _dump(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.pickled,)


def _dump(message: Any) -> bytes:
    """Pickle a message with the code of the test modules that it needs, which a child cannot import."""
    import cloudpickle  # here: submitit brings it, and tests without ranks do without both

    here = os.path.dirname(__file__)
    modules = [
        module for module in list(sys.modules.values()) if (getattr(module, "__file__", "") or "").startswith(here)
    ]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(message)
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _serve(connection: Connection, environ: dict[str, str]) -> None:
    """What a rank runs: join the others as under torchrun, then call what the test sends, until it closes."""
    os.environ.update(environ)
    torch.set_num_threads(1)
    from sslx import distributed

    distributed.init("cpu", timeout_s=COLLECTIVE_S)
    with contextlib.suppress(EOFError):
        while True:
            function, args = pickle.loads(connection.recv_bytes())
            try:
                answer = _dump((True, function(*args)))
            except BaseException:
                answer = _dump((False, traceback.format_exc()))
            connection.send_bytes(answer)


class _Pool:
    """W processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        # This process holds the store, on a port that the system chose, so no port can be taken meanwhile.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cloudpickle", "torch._dynamo", "timm", "sslx.train.build"])
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world_size):
            environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(world_size)}
            environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            ours, theirs = context.Pipe()
            target: Any = _ByValue(_serve)
            process = context.Process(target=target, args=(theirs, environ), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        message = _dump((function, args))
        for connection in self.connections:
            connection.send_bytes(message)
        answers: dict[int, Any] = {}
        failures: list[str] = []
        deadline = monotonic() + timeout_s
        while len(answers) < len(self.connections) and monotonic() < deadline:
            waiting = [c for r, c in enumerate(self.connections) if r not in answers]
            for connection in wait(waiting, timeout=deadline - monotonic()):
                rank = self.connections.index(connection)  # pyright: ignore[reportArgumentType]
                succeeded, answers[rank] = self._receive(rank)
                if not succeeded:
                    failures.append(f"rank {rank} of {len(self.connections)}:\n{answers[rank]}")
                    deadline = min(deadline, monotonic() + 2)  # the others may wait for it in a collective
        late = sorted(set(range(len(self.connections))) - set(answers))
        if failures or late:
            self.close()
            failures += [f"rank {rank}: no answer" for rank in late]
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(len(self.connections))]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self.connections[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join(5)
            return False, f"died with exit code {self.processes[rank].exitcode}"

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(0.2)
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RunOnRanks]:
    """``ranks(W, function, *args)`` -> the W results of a test module's function on W real gloo ranks.

    The ranks have joined by ``sslx.distributed.init``.  They stay up for the next call, so a call costs
    milliseconds.  A failure on a rank fails the test with that rank's traceback.
    """
    pytest.importorskip("cloudpickle")
    pools: dict[int, _Pool] = {}

    def run(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 200.0) -> list[Any]:
        if world_size not in pools:
            pools[world_size] = _Pool(world_size)
        try:
            return pools[world_size].run(function, args, timeout_s)
        except BaseException:
            pools.pop(world_size).close()  # ranks that failed in the midst of a collective are of no more use
            raise

    yield run
    for pool in pools.values():
        pool.close()


class _NoHostSync(TorchDispatchMode):
    _INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if name in self._INDEXING
            else []
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select"):
            raise AssertionError(f"aten.{name} waits for the device{' (a boolean mask)' if masks else ''}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_host_sync() -> TorchDispatchMode:
    """``with no_host_sync:`` fails at whatever would make the host wait for a GPU, also on a CPU."""
    return _NoHostSync()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers for each run; the seed is shown with a failure."""
    generator = torch.Generator()
    request.node.add_report_section("setup", "seed of generator", str(generator.seed()))
    return generator


def pytest_configure() -> None:
    """Let processes that tests start heed SIGHUP, which they would inherit as ignored from nohup."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests into tiers, and skip what needs a GPU where there is none."""
    tiers.mark(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
