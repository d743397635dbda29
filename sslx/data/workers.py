"""Worker processes that make numbered results ahead of time: watched, named, and replaced where they die or hang.

Large results do not go through /dev/shm, of which containers have 64 MB: each worker writes into memory of its own that
it shares with this process, and small answers go through a pipe.  Nothing here waits without a limit.
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
from sslx.data.patience import SLICE_S, Patience, Watch, late
from sslx.errors import ConfigError
from sslx.machine import files, proc
from sslx.machine.interrupts import STOPPING

T = TypeVar("T")
AHEAD = 2
"""Results that a worker is asked for before the first of them is taken."""
MOST_LOSSES = 3
"""Workers that may be lost at one result before the run ends."""
_STOPPED_S = 5.0  # after which a worker that somebody has stopped is replaced
_HEADER = struct.Struct("=qq")  # of a worker's memory: reads begun, what it reads
_ASK = struct.Struct("=qq")  # a result's number, its place
_LENGTH = struct.Struct("=Q")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_SIGNALS = (*STOPPING, signal.SIGUSR1)


class Deadly(RuntimeError):
    """A sample that ends each process that reads it.  index: its place in the source."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class WorkerError(Exception):
    """What a worker raised that it should not have: its traceback, as text."""


class Memory:
    """Bytes that this process and a worker both see: a header, then AHEAD places of ``place_bytes`` each.

    From the kernel's own shared memory, which has no limit but the machine's, and takes room only once written to.
    """

    def __init__(self, place_bytes: int) -> None:
        self.place_bytes = -(-place_bytes // 64) * 64
        self._fd = files.in_memory()
        os.ftruncate(self._fd, 64 + AHEAD * self.place_bytes)
        self._map()

    def _map(self) -> None:
        self._bytes = mmap.mmap(self._fd, 64 + AHEAD * self.place_bytes)
        self._all = torch.frombuffer(self._bytes, dtype=torch.uint8)

    def __getstate__(self) -> tuple[Any, int]:  # to a spawned worker; a forked one has it as it is
        return reduction.DupFd(self._fd), self.place_bytes

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self._fd, self.place_bytes = state[0].detach(), state[1]
        self._map()

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._fd)

    def place(self, number: int) -> Tensor:
        """(place_bytes,) uint8."""
        start = 64 + number * self.place_bytes
        return self._all[start : start + self.place_bytes]

    def begin(self, index: int) -> None:
        """In the worker: say that it now reads sample ``index``."""
        begun, _ = _HEADER.unpack_from(self._bytes)
        _HEADER.pack_into(self._bytes, 0, begun + 1, index)

    def begun(self) -> tuple[int, int]:
        """(reads begun so far, the sample being read or read last; -1: none)."""
        begun, index = _HEADER.unpack_from(self._bytes)
        return begun, index if begun else -1


Work = Callable[[int, Tensor, Callable[[int], None]], Any]
"""``work(number, place, begin)`` -> what goes through the pipe; ``begin(index)`` before each sample is read."""


def unseen(_: int) -> None:
    """What stands for ``begin`` where this process does the work itself, and nobody watches."""


def answer_alone(_: int, answer: T, place: Tensor) -> T:
    """A ``take`` of results that have nothing beside their answer."""
    del place
    return answer


class _Worker:
    """A process, its pipe and memory, and what it was asked for."""

    def __init__(self, work: Work, place_bytes: int) -> None:
        self.work, self.memory = work, Memory(place_bytes)
        self.asked: deque[tuple[int, int]] = deque()
        self.losses = 0
        self.last_crash = -1

    def start(self, others: list[connection.Connection]) -> None:
        context = multiprocessing.get_context()
        self.pipe, theirs = context.Pipe()
        method = context.get_start_method()
        ours = [*others, self.pipe] if method == "fork" else []
        parent = os.getpid() if method != "forkserver" else 0
        self.process = context.Process(target=_serve, args=(self.work, self.memory, theirs, ours, parent), daemon=True)
        # A signal to the whole process group must not reach a child that still has this process's handlers, and what
        # is garbage here must not be collected there: a DALI pipeline's end waits for threads, which a fork leaves out.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        collects = gc.isenabled()
        gc.disable()
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            if collects:
                gc.enable()
        theirs.close()
        self.buffer, self.ended = bytearray(), False
        for number, place in self.asked:
            self._send(number, place)

    def ask(self, number: int, place: int) -> None:
        self.asked.append((number, place))
        self._send(number, place)

    def _send(self, number: int, place: int) -> None:
        with suppress(OSError):  # it has died, which is found when its result is waited for
            self.pipe.send_bytes(_ASK.pack(number, place))

    def read(self) -> None:
        """Take what is in the pipe, a piece at a time: a worker may be stopped in the middle of an answer."""
        try:
            piece = os.read(self.pipe.fileno(), 1 << 20)
        except OSError:
            piece = b""
        self.buffer += piece
        self.ended = not piece

    def answer(self) -> Any:
        """The next whole answer, None if it has not come."""
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
    """``num_workers`` processes that make results by number, given out in order.

    work: is pickled where processes are spawned.  place_bytes: what a result needs at most besides its answer.
    name: of sample ``index``, for messages.  To be closed.
    """

    def __init__(
        self, work: Work, num_workers: int, *, place_bytes: int, patience: Patience, name: Callable[[int], str]
    ) -> None:
        self._patience, self._name = patience, name
        self._workers: list[_Worker] = []
        # Before multiprocessing's own end, which would wait for workers that are asked nothing any more.
        self.close = util.Finalize(self, _kill, (self._workers,), exitpriority=10)
        for _ in range(num_workers):
            worker = _Worker(work, place_bytes)
            worker.start([other.pipe for other in self._workers])
            self._workers.append(worker)

    def results(self, numbers: Iterable[int], take: Callable[[int, Any, Tensor], T]) -> Iterator[T]:
        """Yield ``take(number, answer, place)`` of each number in order; the place is written over after it.

        Raises RuntimeError (or MemoryError) where ``work`` did, Deadly, StopWaiting, StorageError at the limit
        of patience, and ConfigError where workers are killed again and again.
        """
        to_ask = iter(numbers)
        for turn, number in enumerate(islice(to_ask, AHEAD * len(self._workers))):
            self._workers[turn % len(self._workers)].ask(number, turn // len(self._workers))
        turn = 0
        while (worker := self._workers[turn % len(self._workers)]).asked:
            answer = self._receive(worker)
            number, place = worker.asked.popleft()
            worker.losses = 0
            made = take(number, _checked(answer), worker.memory.place(place))
            for following in islice(to_ask, 1):
                worker.ask(following, place)
            yield made
            turn += 1

    def _receive(self, worker: _Worker) -> Any:
        watch = Watch(self._patience, lambda: self._describe(worker))
        begun = worker.memory.begun()
        while (answer := worker.answer()) is None:
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
            if (now := worker.memory.begun()) != begun:
                begun = now
                watch.progress()
            if watch.slept(SLICE_S):
                self._replace(worker, f"made nothing for {self._patience.limit_s:g} s {self._at(worker)}", hung=True)
                watch.progress()
            elif watch.waited_s >= _STOPPED_S and proc.state(worker.process.pid or 0) == "T":
                self._replace(worker, f"was stopped by a signal {self._at(worker)}")
                watch.progress()
        return answer

    def _replace(self, worker: _Worker, what: str, *, hung: bool = False) -> None:
        """Start another process in the worker's place, which makes the same; or raise where that has not helped."""
        pid, last = worker.process.pid, worker.memory.begun()[1]
        described = f"loader worker {pid} {what}"
        worker.kill()
        code = worker.process.exitcode or 0
        worker.losses += 1
        if hung and worker.losses > 1:
            raise late(self._patience, described)
        if -code in _CRASHES:
            if last >= 0 and last == worker.last_crash:
                raise Deadly(last, f"it ends each process that reads it ({_signal_name(-code)})")
            worker.last_crash = last
        if worker.losses >= MOST_LOSSES:
            raise ConfigError(
                f"{MOST_LOSSES} loader workers of rank {distributed.rank()} were lost at the same batch, the last: "
                f"{described}: if memory ran out, take fewer --data.threads or a smaller --batch-size"
            )
        worker.start([other.pipe for other in self._workers if other is not worker and not other.pipe.closed])
        self._patience.say(f"{described}: replaced by {worker.process.pid}, which makes the same batches")

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
    raise {"runtime": RuntimeError, "memory": MemoryError}.get(kind, WorkerError)(value)


def _serve(
    work: Work, memory: Memory, pipe: connection.Connection, others: list[connection.Connection], parent: int
) -> None:
    """The life of a worker: it makes what it is asked for until its pipe ends."""
    gc.freeze()  # what was there before it is never collected
    gc.enable()
    for number in _SIGNALS:  # the run decides, and ends its workers itself
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # the parent's
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux" and parent:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan, whatever ends the parent
        if os.getppid() != parent:
            return
    torch.set_num_threads(1)
    for other in others:  # else the workers before this one would not see the parent's end
        other.close()
    while True:
        try:
            number, place = _ASK.unpack(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer = ("result", work(number, memory.place(place), memory.begin))
        except MemoryError as error:
            answer = ("memory", str(error))
        except RuntimeError as error:
            answer = ("runtime", str(error))
        except Exception:
            answer = ("bug", traceback.format_exc())
        message = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        with suppress(BrokenPipeError):
            _write(pipe.fileno(), _LENGTH.pack(len(message)))
            _write(pipe.fileno(), message)


def _write(fd: int, message: bytes) -> None:
    left = memoryview(message)
    while left:
        left = left[os.write(fd, left) :]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
