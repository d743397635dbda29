"""``sslx pretrain``: starts the ranks, passes signals on, leaves no orphan, maps outcomes to exit codes."""

import re
import signal
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from sslx import cli, distributed
from sslx.config import PretrainConfig
from sslx.console import activity
from sslx.console.display import Terminal
from sslx.errors import ConfigError, DeviceError, RanksError, StorageError, UserError
from sslx.machine import deterministic, device_errors, environment, interrupts, limits
from sslx.machine.interrupts import exit_code
from sslx.runs import ending, records
from sslx.train.pretrain import Position, pretrain
from sslx.train.processes import start
from sslx.train.roll_call import RollCall
from sslx.train.signals import StopSignals, give_up_s

_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|NCCL communicator was aborted|"
    r"Connection was likely closed|Connection refused|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_TOO_LATE = re.compile(r"timed out waiting|wait timeout|timeout after|Watchdog caught collective", re.IGNORECASE)

_MAY_GO_ON = (cli.EXIT_CRASH, DeviceError.exit_code, StorageError.exit_code)
"""Exit codes of failures after which the same command may do better."""


def main(settings: PretrainConfig, argv: Sequence[str], stop: StopSignals | None = None) -> int:
    """Join the ranks that torchrun or Slurm started, or start them with ``argv``; returns the exit code.

    settings: those of argv.  stop: entered already, by a job that listened before it imported all this.
    """
    limits.allow_files()
    if distributed.joined() is not None:
        return work(settings, stop)
    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    ranks = settings.ranks or max(1, gpus)
    if settings.batch_size % (ranks * settings.micro_batches):  # before anything is started
        share = ranks * settings.micro_batches
        raise ConfigError(
            f"batch size {settings.batch_size} must be divisible by ranks x micro-batches = {ranks} x "
            f"{settings.micro_batches}: take --batch-size {max(1, settings.batch_size // share) * share}"
        )
    if ranks == 1:
        return work(settings, stop)
    if stop:
        stop.hand_over()
    return start(argv, ranks)


def work(settings: PretrainConfig, listening: StopSignals | None = None) -> int:
    """Be one rank: train, and leave ``status.json`` and an exit code behind."""
    position = Position(terminal=Terminal(enabled=_rank() == 0))
    with nullcontext(listening) if listening else StopSignals(give_up_s()) as stop:
        stop.on_stop = partial(_answer, position, stop)
        stop.on_query = partial(_report, position)
        stop.on_give_up = partial(_give_up, position, stop)
        stop.on_end_now = partial(_end_now, position)
        if stop.received:  # while nothing answered yet
            _answer(position, stop)
        try:
            code = _work(settings, position, stop)
        finally:
            if position.lock:
                position.lock.release()
        interrupts.settle()
        if not distributed.abandon():  # after an error: Python would wait at its end for what has not ended by now
            stop.leave(code)
    return code


def _work(settings: PretrainConfig, position: Position, stop: StopSignals) -> int:
    try:
        with position.terminal:
            with activity.doing("waiting for the other ranks"):
                ranks = distributed.init(settings.device)
            say = cli.note if ranks.is_main else None
            with RollCall(distributed.board(), lambda: position.step, say) as position.roll_call:
                position.roll_call.on_deadlock = partial(_deadlock, position)
                received = pretrain(settings, ranks, stop, position)
        code = _end(position, received)
        if received:  # rank 0 saves, and whoever starts the ranks ends them all once one has left
            distributed.barrier()
        distributed.shutdown()
        return code
    except (BrokenPipeError, SystemExit):  # rich exits on the former
        return _fail(position, "nothing reads the output any more (a closed pipe): send it to a file", 141)
    except Exception as error:
        if not isinstance(error, UserError) and lost_peer(error):
            time.sleep(1)  # the rank that failed speaks first
            status = records.read_status(position.folder) if position.folder else None
            told = status is not None and status.state != "running"
            return cli.EXIT_CRASH if told else _fail(position, "another rank ended, without a word", cli.EXIT_CRASH)
        if reason := explained(error, position):
            return _fail(position, *reason, error.topic if isinstance(error, UserError) else "")
        if stop.received and position.step == position.saved:  # Ctrl-C ends the compiler too, in the first step
            return _end(position, stop.received)
        traceback.print_exc()
        return _fail(position, traceback.format_exception_only(error)[0].splitlines()[0], cli.EXIT_CRASH)


def explained(error: Exception, position: Position) -> tuple[str, int] | None:
    """What a user can mend, and the exit code; None for a bug."""
    if words := device_errors.explain(error):
        return words
    if words := limits.explain(error):
        return words, limits.EXIT_CODE
    if words := deterministic.explain(error):
        return words, ConfigError.exit_code
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if distributed.world_size() > 1 and _TOO_LATE.search(str(error)):
        late = position.roll_call.late() or "the ranks wait for one another"
        step = position.step + 1
        return (
            f"step {step:,} has not ended for {position.roll_call.stuck_s():.0f} s: {late}; the last checkpoint is "
            f"step {position.saved:,} (SSLX_STALL_S sets the seconds)",
            RanksError.exit_code,
        )
    return None


def _end(position: Position, received: int | None) -> int:
    """Leave behind that the run is done, or saved after a signal; returns the exit code."""
    code = exit_code(received) if received else 0
    if distributed.rank() == 0 and (folder := position.owned):
        state, reason = (_state(received), signal.Signals(received).name) if received else ("done", "")
        records.write_status(folder, state, position.step, reason, code)
        if received:
            _tell(position, ending.stopped(folder, *position.at, _cause(received)))
        else:
            lines = ending.finished_before if position.was_done else ending.finished
            _tell(position, lines(folder, position.step))
    return code


def _state(received: int) -> records.State:
    """What a run is that this signal has stopped."""
    return "stopped" if received == signal.SIGINT else "preempted"


def _cause(received: int) -> str:
    return "Ctrl-C" if received == signal.SIGINT else signal.Signals(received).name


def _tell(position: Position, lines: Sequence[str]) -> None:
    """The last lines of the run, on rank 0, below its display."""
    position.terminal.close()
    for line in lines:
        position.terminal.message(line)


def _answer(position: Position, stop: StopSignals) -> None:
    """Called by a thread at the first stopping signal: before the first step there is nothing to save or wait for."""
    position.roll_call.stopping = stop.received
    if position.say:
        if _rank() == 0:
            words = "saving after this step; press Ctrl-C again to end now"
            position.say(
                words if stop.received == signal.SIGINT else f"{_cause(stop.received)}: saving after this step"
            )
        return
    name = signal.Signals(stop.received).name
    try:
        if _rank() == 0:
            position.terminal.close()
            by = "" if stop.received == signal.SIGINT else f" by {name}"
            cli.note(f"interrupted{by} before the first step")
            if folder := position.owned:
                records.write_status(folder, _state(stop.received), position.saved, name, exit_code(stop.received))
                _tell(position, ending.stopped(folder, *position.at, _cause(stop.received)))
        if position.lock:
            position.lock.release()
    finally:
        stop.leave(exit_code(stop.received))


def _report(position: Position) -> None:
    """Called by a thread at SIGUSR1: where the run stands."""
    if _rank() == 0:
        say = position.say or cli.note
        where = f"step {position.step:,}" if position.say else "before the first step"
        late = position.roll_call.late()
        late = f": {late}" if late else ""
        say(f"{where}, checkpoint {position.saved:,}, {position.roll_call.stuck_s():.1f} s since the last step{late}")


def _end_now(position: Position) -> None:
    """Called by a thread at a second Ctrl-C, which does not wait for this step."""
    if _rank() == 0 and (folder := position.owned):
        saved = records.newest_step(folder)  # a save may be under way
        records.write_status(folder, "stopped", saved, "SIGINT", exit_code(signal.SIGINT))
        _tell(position, ending.stopped(folder, position.step, saved, "Ctrl-C"))


def _give_up(position: Position, stop: StopSignals, limit_s: float) -> None:
    """Called by a thread: a rank hangs, and this one waits for it."""
    if not position.roll_call.leads():
        return
    saved = records.newest_step(position.folder) if position.folder else 0  # rank 0 may hang in its save
    late, reason = position.roll_call.late(), signal.Signals(stop.received).name
    if late or position.step > position.saved:  # else nothing is lost, for instance in the compilation
        reason += f"; {late and late + ', and '}no step ended in {limit_s:.0f} s"
        position.terminal.close()
        cli.complain(f"{reason}: giving up, at the checkpoint of step {saved:,}", exit_code(stop.received))
    if position.owned:
        records.write_status(position.owned, _state(stop.received), saved, reason, exit_code(stop.received))
        if _rank() == 0:
            _tell(position, ending.stopped(position.owned, position.step, saved, _cause(stop.received)))


def _deadlock(position: Position, late: str) -> None:
    """Called by a thread of rank 0: the ranks wait for one another, and would until their collectives time out."""
    step, code = position.step + 1, RanksError.exit_code
    try:
        _fail(position, f"step {step:,} cannot end: {late}; the last checkpoint is step {position.saved:,}", code)
        if position.lock:
            position.lock.release()
    finally:
        interrupts.leave(code)


def _rank() -> int:
    """This process's, before it has joined the others too."""
    return environment.joined() or 0


def lost_peer(error: Exception) -> bool:
    """Whether this is what a collective raises when another rank has ended."""
    return _LOST_PEER.search(str(error)) is not None


def _fail(position: Position, reason: str, code: int, topic: str = "") -> int:
    if folder := position.owned:  # what is another run's by now, or was deleted, gets no status from here
        records.write_status(folder, "failed", position.step, reason, code)
    position.terminal.close()
    cli.complain(reason, code, topic)
    if folder and code in _MAY_GO_ON and _rank() == 0:
        _tell(position, ending.failed(folder, position.saved))
    return code
