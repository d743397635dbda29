"""``sslx pretrain``: starts the ranks, passes signals on, leaves no orphan, maps outcomes to exit codes."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import FrameType

import torch

from sslx import cli, config, cores, distributed, outcome
from sslx.config import PretrainConfig
from sslx.errors import ConfigError, UserError
from sslx.train.pretrain import Position, pretrain
from sslx.train.signals import STOPPING, StopSignals, exit_code, give_up_s

_LOST_PEER = re.compile(r"closed by peer|reset by peer|Broken pipe|remote process exited|NCCL communicator was aborted")


def main(argv: Sequence[str], stop: StopSignals | None = None) -> int:
    """Join the ranks that torchrun or Slurm started, or start them; returns the exit code.

    stop: entered already, by a job that listened before it imported all this.
    """
    rank = distributed.joined()
    settings = config.load(argv, quiet=rank not in (None, 0))
    if rank is not None:
        return work(settings, stop)
    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    ranks = settings.ranks or max(1, gpus)
    if settings.batch_size % (ranks * settings.micro_batches):  # before anything is started
        share = ranks * settings.micro_batches
        raise ConfigError(
            f"batch size {settings.batch_size} must be divisible by ranks x micro-batches = {ranks} x "
            f"{settings.micro_batches}: take --batch-size {max(1, settings.batch_size // share) * share}"
        )
    return work(settings, stop) if ranks == 1 else start(argv, ranks)


def work(settings: PretrainConfig, listening: StopSignals | None = None) -> int:
    """Be one rank: train, and leave ``status.json`` and an exit code behind."""
    position = Position()
    with nullcontext(listening) if listening else StopSignals(give_up_s()) as stop:
        stop.on_give_up = partial(_give_up, position, stop)
        try:
            received = pretrain(settings, distributed.init(settings.device), stop, position)
            code = _end(position, received)
            if received:  # rank 0 saves, and whoever starts the ranks ends them all once one has left
                distributed.barrier()
            distributed.shutdown()
            return code
        except UserError as error:
            return _fail(position, str(error), error.exit_code)
        except torch.OutOfMemoryError as error:
            return _fail(
                position,
                "out of GPU memory: take a smaller --batch-size or --data.size, more --accumulate, or --precision "
                f"bf16 ({str(error).splitlines()[0]})",
                ConfigError.exit_code,
            )
        except (BrokenPipeError, SystemExit):  # rich exits on the former
            return _fail(position, "nothing reads the output any more (a closed pipe): send it to a file", 141)
        except Exception as error:
            if lost_peer(error):
                time.sleep(1)  # the rank that failed speaks first
                status = outcome.read_status(position.folder) if position.folder else None
                told = status is not None and status.state != "running"
                return cli.EXIT_CRASH if told else _fail(position, "another rank ended, without a word", cli.EXIT_CRASH)
            if stop.received and position.step == position.saved:  # Ctrl-C ends the compiler too, in the first step
                return _end(position, stop.received)
            traceback.print_exc()
            return _fail(position, traceback.format_exception_only(error)[0].splitlines()[0], cli.EXIT_CRASH)
        finally:
            if position.lock:
                position.lock.release()


def _end(position: Position, received: int | None) -> int:
    """Leave behind that the run is done, or saved after a signal; returns the exit code."""
    code = exit_code(received) if received else 0
    if distributed.rank() == 0 and (folder := position.owned):
        state, reason = ("preempted", signal.Signals(received).name) if received else ("done", "")
        outcome.write_status(folder, state, position.step, reason, code)
    return code


def _give_up(position: Position, stop: StopSignals) -> None:
    """Called by a thread: a rank hangs, and this one waits for it."""
    reason = f"{signal.Signals(stop.received).name}; no step ended in {give_up_s():g} s"
    sys.stderr.write(f"rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or 0}: {reason}: giving up\n")
    if distributed.rank() == 0 and position.owned:
        outcome.write_status(position.owned, "preempted", position.saved, reason, 75)


def lost_peer(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has ended."""
    return _LOST_PEER.search(str(error)) is not None


def _fail(position: Position, reason: str, code: int) -> int:
    if folder := position.owned:  # what is another run's by now, or was deleted, gets no status from here
        outcome.write_status(folder, "failed", position.step, reason, code)
    return cli.complain(reason, code)


def _free_port() -> int:
    """A port below the ephemeral ones, which nobody is given in the seconds until rank 0 listens on it."""
    first = os.getpid()
    for number in range(first, first + 1_000):
        port = 12_000 + number % 20_000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise ConfigError("1,000 ports from 12,000 on are taken: end what listens there, or start the ranks by torchrun")


def start(argv: Sequence[str], ranks: int, subcommand: str = "pretrain") -> int:
    """Run ``sslx`` with this subcommand once a rank, on this machine; returns the first failing rank's code, or 0.

    Each rank is a process group of its own, so that a Ctrl-C reaches it once, through this process.
    """
    threads = str(cores.share(ranks))
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    command = [sys.executable, "-m", "sslx", subcommand, *argv]
    parent = os.getpid()
    children = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
        for rank in range(ranks)
    ]

    def forward(number: int, _: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, the others get ten seconds to notice by themselves."""
    first, deadline = 0, float("inf")
    while (codes := [child.poll() for child in children]).count(None):
        if not first and (first := next((code for code in codes if code), 0)):
            deadline = time.monotonic() + (30 if first in (75, 130) else 10)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    first = first or next((code for code in codes if code), 0)
    return 128 - first if first < 0 else first  # as a shell says it: 137 for SIGKILL


def _die_with(parent: int) -> None:
    """In the child: be killed when the launcher dies, even by SIGKILL (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
