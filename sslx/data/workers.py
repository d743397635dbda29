"""Worker processes that make numbered results ahead of time, and are replaced if they die or hang.

Large results do not go through /dev/shm, because containers limit it to 64 MB: each worker shares a block of memory
with this process, and small answers go through a pipe.  Every wait has a limit.
"""

import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing import connection, reduction, util
from typing import Any, TypeVar

import torch
from torch import Tensor

from sslx import distributed
from sslx.data.waiting import SLICE_S, WaitPolicy, Watch, late, report_to
from sslx.errors import ConfigError, UserError
from sslx.machine import files, proc
from sslx.machine.interrupts import STOPPING

T = TypeVar("T")
AHEAD = 2
"""Number of results that each worker makes ahead of time, unless a pool is told otherwise."""
MAX_LOSSES = 3
"""Number of workers lost at one result that ends the run."""
_STOPPED_S = 5.0  # time after which a worker stopped by a signal is replaced
_HEADER = struct.Struct("=qq")  # of a worker's memory: number of reads begun, sample being read
_REQUEST = struct.Struct("=qq")  # a result's number and its place
_LENGTH = struct.Struct("=Q")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_SIGNALS = (*STOPPING, signal.SIGUSR1)


class Deadly(RuntimeError):
    """A sample ends every process that reads it.  index: its place in the source."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class WorkerError(Exception):
    """A worker raised an unexpected exception.  The message is its traceback."""


class Memory:
    """Memory shared by this process and a worker: a header, then ``ahead`` places of ``place_bytes`` each.

    It is an anonymous file (memfd), limited only by the machine's memory and allocated when it is first written to.
    """

    def __init__(self, place_bytes: int, ahead: int = AHEAD) -> None:
        self.place_bytes, self.ahead = -(-place_bytes // 64) * 64, ahead
        self._fd = files.in_memory()
        os.ftruncate(self._fd, 64 + ahead * self.place_bytes)
        self._map()

    def _map(self) -> None:
        self._bytes = mmap.mmap(self._fd, 64 + self.ahead * self.place_bytes)
        self._all = torch.frombuffer(self._bytes, dtype=torch.uint8)

    def __getstate__(self) -> tuple[Any, int, int]:  # for spawned workers; forked ones inherit it
        return reduction.DupFd(self._fd), self.place_bytes, self.ahead

    def __setstate__(self, state: tuple[Any, int, int]) -> None:
        self._fd, self.place_bytes, self.ahead = state[0].detach(), *state[1:]
        self._map()

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._fd)

    def place(self, number: int) -> Tensor:
        """Return the bytes of a place: (place_bytes,) uint8."""
        start = 64 + number * self.place_bytes
        return self._all[start : start + self.place_bytes]

    def begin(self, index: int) -> None:
        """Note in the worker that it begins to read sample ``index``."""
        begun, _ = _HEADER.unpack_from(self._bytes)
        _HEADER.pack_into(self._bytes, 0, begun + 1, index)

    def begun(self) -> tuple[int, int]:
        """Return the number of reads begun and the sample that was begun last, or -1 before the first one."""
        begun, index = _HEADER.unpack_from(self._bytes)
        return begun, index if begun else -1


Work = Callable[[int, Tensor, Callable[[int], None]], Any]
"""``work(number, place, begin)`` returns the answer for the pipe and calls ``begin(index)`` before reading a sample."""


def unseen(_: int) -> None:
    """Do nothing: the ``begin`` of work that this process does itself."""


def answer_alone(_: int, answer: T, place: Tensor) -> T:
    """Return the answer: the ``take`` of results that use no shared memory."""
    del place
    return answer


class _Worker:
    """A process, its pipe, its memory, and the requests that it has not answered yet."""

    def __init__(self, work: Work, place_bytes: int, ahead: int) -> None:
        self.work, self.memory = work, Memory(place_bytes, ahead)
        self.requests: deque[tuple[int, int]] = deque()
        self.losses = 0
        self.last_crash = -1

    def start(self, others: list[connection.Connection]) -> None:
        context = multiprocessing.get_context()
        self.pipe, worker_end = context.Pipe()
        method = context.get_start_method()
        inherited = [*others, self.pipe] if method == "fork" else []
        parent = os.getpid() if method != "forkserver" else 0
        self.process = context.Process(
            target=_serve, args=(self.work, self.memory, worker_end, inherited, parent), daemon=True
        )
        # A signal to the process group must not reach a child that still has this process's handlers, and this
        # process's garbage must not be collected there: a DALI pipeline's destructor waits for threads, which do not
        # exist after a fork.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        gc_was_enabled = gc.isenabled()
        gc.disable()
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            if gc_was_enabled:
                gc.enable()
        worker_end.close()
        self.buffer, self.ended = bytearray(), False
        for number, place in self.requests:
            self._send(number, place)

    def ask(self, number: int, place: int) -> None:
        self.requests.append((number, place))
        self._send(number, place)

    def _send(self, number: int, place: int) -> None:
        with suppress(OSError):  # a dead worker is noticed in the wait for its result
            self.pipe.send_bytes(_REQUEST.pack(number, place))

    def read(self) -> None:
        """Read what is in the pipe without waiting for more: a worker may be stopped in the middle of an answer."""
        try:
            piece = os.read(self.pipe.fileno(), 1 << 20)
        except OSError:
            piece = b""
        self.buffer += piece
        self.ended = not piece

    def answer(self) -> Any:
        """Return the next whole answer, or None if it has not arrived."""
        if len(self.buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self.buffer)[0]
        if len(self.buffer) < end:
            return None
        answer = pickle.loads(memoryview(self.buffer)[_LENGTH.size : end])
        self.buffer = self.buffer[end:]
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.pipe.close()


class Pool:
    """``num_workers`` processes that make numbered results, delivered in order.  Close the pool after use.

    work: pickled if processes are spawned.  place_bytes: the maximum size of a result, apart from its answer.
    name: returns the name of sample ``index`` for messages.  ahead: the number of results that each worker makes ahead.
    """

    def __init__(
        self,
        work: Work,
        num_workers: int,
        *,
        place_bytes: int,
        wait_policy: WaitPolicy,
        name: Callable[[int], str],
        ahead: int = AHEAD,
    ) -> None:
        self._wait_policy, self._name, self._ahead = wait_policy, name, ahead
        self._workers: list[_Worker] = []
        # Runs before multiprocessing's own cleanup, which would wait forever for idle workers.
        self.close = util.Finalize(self, _kill, (self._workers,), exitpriority=10)
        for _ in range(num_workers):
            worker = _Worker(work, place_bytes, ahead)
            worker.start([other.pipe for other in self._workers])
            self._workers.append(worker)

    def results(self, numbers: Iterable[int], take: Callable[[int, Any, Tensor], T]) -> Iterator[T]:
        """Yield ``take(number, answer, place)`` for each number in order.  Afterwards the place is overwritten.

        Raises the RuntimeError, MemoryError or UserError that ``work`` raised, Deadly, StopWaiting, StorageError at
        the limit of wait_policy, and ConfigError if workers are killed repeatedly.
        """
        remaining = iter(numbers)
        for turn, number in enumerate(islice(remaining, self._ahead * len(self._workers))):
            self._workers[turn % len(self._workers)].ask(number, turn // len(self._workers))
        turn = 0
        while (worker := self._workers[turn % len(self._workers)]).requests:
            answer = self._receive(worker)
            number, place = worker.requests.popleft()
            worker.losses = 0
            result = take(number, _checked(answer), worker.memory.place(place))
            for following in islice(remaining, 1):
                worker.ask(following, place)
            yield result
            turn += 1

    def _receive(self, worker: _Worker) -> Any:
        watch = Watch(self._wait_policy, lambda: self._describe(worker))
        begun = worker.memory.begun()
        while (answer := self._heard(worker)) is None:
            if worker.ended:
                self._replace(worker, self._death(worker))
                watch.progress()
                continue
            ready = connection.wait([w.pipe for w in self._workers if not w.ended], SLICE_S)
            for other in self._workers:
                if other.pipe in ready:
                    other.read()
            if ready:
                continue
            if (latest := worker.memory.begun()) != begun:
                begun = latest
                watch.progress()
            if watch.slept(SLICE_S):
                self._replace(worker, f"made nothing for {self._wait_policy.limit_s:g} s {self._at(worker)}", hung=True)
                watch.progress()
            elif watch.waited_s >= _STOPPED_S and proc.state(worker.process.pid or 0) == "T":
                self._replace(worker, f"was stopped by a signal {self._at(worker)}")
                watch.progress()
        return answer

    def _heard(self, worker: _Worker) -> Any:
        """Return a worker's next answer, or None, and pass on the lines that it says before."""
        while (answer := worker.answer()) is not None and answer[0] == "line":
            self._wait_policy.say(answer[1])
        return answer

    def _replace(self, worker: _Worker, event: str, *, hung: bool = False) -> None:
        """Start another process in the worker's place for the same results; raise if that has not helped before."""
        pid, last = worker.process.pid, worker.memory.begun()[1]
        described = f"loader worker {pid} {event}"
        worker.kill()
        code = worker.process.exitcode or 0
        worker.losses += 1
        if hung and worker.losses > 1:
            raise late(self._wait_policy, described)
        if -code in _CRASHES:
            if last >= 0 and last == worker.last_crash:
                raise Deadly(last, f"it ends every process that reads it ({_signal_name(-code)})")
            worker.last_crash = last
        if worker.losses >= MAX_LOSSES:
            raise ConfigError(
                f"{MAX_LOSSES} loader workers of rank {distributed.rank()} were lost at the same batch, the last: "
                f"{described}: if memory ran out, take fewer --data.threads or a smaller --batch-size"
            )
        worker.start([other.pipe for other in self._workers if other is not worker and not other.pipe.closed])
        self._wait_policy.say(f"{described}: replaced by {worker.process.pid}, which makes the same batches")

    def _death(self, worker: _Worker) -> str:
        worker.process.join(5)
        code = worker.process.exitcode or 0
        if code < 0:
            memory = ", as the kernel does where memory runs out," if -code == signal.SIGKILL else ""
            return f"was ended by {_signal_name(-code)}{memory} {self._at(worker)}"
        return f"ended with exit code {code} {self._at(worker)}"

    def _at(self, worker: _Worker) -> str:
        index = worker.memory.begun()[1]
        return f"at {self._name(index)}" if index >= 0 else "before its first image"

    def _describe(self, worker: _Worker) -> str:
        states = {"T": ", stopped", "D": ", in a read that the file system does not answer"}
        state = states.get(proc.state(worker.process.pid or 0), "")
        return f"loader worker {worker.process.pid}{state} {self._at(worker)}"


def _kill(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.kill()


def _checked(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "result":
        return value
    if kind == "user":
        raise value
    raise {"runtime": RuntimeError, "memory": MemoryError}.get(kind, WorkerError)(value)


def _serve(
    work: Work, memory: Memory, pipe: connection.Connection, others: list[connection.Connection], parent: int
) -> None:
    """Serve requests in a worker until the pipe is closed."""
    gc.freeze()  # objects of the parent are never collected
    gc.enable()
    for number in _SIGNALS:  # the run handles signals and ends its workers itself
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the parent's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux" and parent:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, whatever ends it
        if os.getppid() != parent:
            return
    torch.set_num_threads(1)
    for other in others:  # inherited pipe ends would hide the parent's death from earlier workers
        other.close()
    report_to(lambda line: _send(pipe.fileno(), ("line", line)), on_sign=lambda: memory.begin(memory.begun()[1]))
    while True:
        try:
            number, place = _REQUEST.unpack(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer = ("result", work(number, memory.place(place), memory.begin))
        except MemoryError as error:
            answer = ("memory", str(error))
        except RuntimeError as error:
            answer = ("runtime", str(error))
        except UserError as error:
            answer = ("user", error)
        except Exception:
            answer = ("bug", traceback.format_exc())
        _send(pipe.fileno(), answer)


def _send(fd: int, answer: tuple[str, Any]) -> None:
    """Send an answer, or a line to be said before it."""
    message = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
    with suppress(BrokenPipeError):
        _write(fd, _LENGTH.pack(len(message)))
        _write(fd, message)


def _write(fd: int, message: bytes) -> None:
    remaining = memoryview(message)
    while remaining:
        remaining = remaining[os.write(fd, remaining) :]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
