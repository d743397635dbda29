"""``sslx pretrain``: start the ranks, pass signals on, leave no orphans, and turn outcomes into exit codes."""

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
from sslx.runs import last_lines, records
from sslx.train.late_ranks import LateRanks
from sslx.train.pretrain import Position, pretrain
from sslx.train.processes import start
from sslx.train.signals import StopSignals, give_up_s

_PEER_ENDED = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|NCCL communicator was aborted|"
    r"Connection was likely closed|Connection refused|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_TIMEOUT = re.compile(r"timed out waiting|wait timeout|timeout after|Watchdog caught collective", re.IGNORECASE)

_CAN_CONTINUE = (cli.EXIT_CRASH, DeviceError.exit_code, StorageError.exit_code)
"""Exit codes of failures after which the same command may succeed."""


def main(
    settings: PretrainConfig, argv: Sequence[str], stop: StopSignals | None = None, position: Position | None = None
) -> int:
    """Join the ranks that torchrun or Slurm started, or start them with ``argv``.  Return the exit code.

    settings: those of argv.  stop: already entered, by a job that handles signals before it imports everything.
    position: is kept up to date if the run is of this process.
    """
    limits.raise_file_limit()
    if distributed.launched_rank() is not None:
        return run_rank(settings, stop, position)
    gpus = torch.cuda.device_count() if settings.device != "cpu" else 0
    ranks = settings.ranks or max(1, gpus)
    divisor = ranks * settings.batches_per_step
    if settings.batch_size % divisor:  # checked before anything is started
        raise ConfigError(
            f"batch size {settings.batch_size} must be divisible by ranks x micro-batches = {ranks} x "
            f"{settings.batches_per_step}: use --batch-size {max(1, settings.batch_size // divisor) * divisor}"
        )
    if ranks == 1:
        return run_rank(settings, stop, position)
    if stop:
        stop.hand_over()
    return start(argv, ranks)


def run_rank(
    settings: PretrainConfig, entered_stop: StopSignals | None = None, position: Position | None = None
) -> int:
    """Train as one rank, write ``status.json`` and return the exit code."""
    position = position or Position(terminal=Terminal(enabled=_rank() == 0))
    with nullcontext(entered_stop) if entered_stop else StopSignals(give_up_s()) as stop:
        stop.on_stop = partial(_acknowledge, position, stop)
        stop.on_query = partial(_report, position)
        stop.on_give_up = partial(_give_up, position, stop)
        stop.on_end_now = partial(_end_now, position)
        if stop.received:  # before the callbacks were set
            _acknowledge(position, stop)
        try:
            code = _train(settings, position, stop)
        finally:
            if position.lock:
                position.lock.release()
        interrupts.decide_outcome()
        if not distributed.abandon():  # after an error, Python would wait at exit for operations that hang
            stop.leave(code)
    return code


def _train(settings: PretrainConfig, position: Position, stop: StopSignals) -> int:
    try:
        with position.terminal:
            with activity.doing("waiting for the other ranks"):
                ranks = distributed.init(settings.device)
            say = cli.note if ranks.is_main else None
            with LateRanks(distributed.board(), lambda: position.step, say) as position.late_ranks:
                position.late_ranks.on_deadlock = partial(_deadlock, position)
                received = pretrain(settings, ranks, stop, position)
        code = _end(position, received)
        if received:  # rank 0 saves, and the launcher ends all ranks once one has left
            distributed.barrier()
        elif position.goes_on:
            distributed.wait_for_main()
        distributed.shutdown()
        return code
    except (BrokenPipeError, SystemExit):  # rich turns a BrokenPipeError into SystemExit
        return _fail(position, "nothing reads the output anymore (a closed pipe): redirect it to a file", 141)
    except Exception as error:
        position.error = error
        if not isinstance(error, UserError) and lost_peer(error):
            time.sleep(1)  # let the rank that failed report first
            status = records.read_status(position.folder) if position.folder else None
            if status is not None and status.state != "running":
                return cli.EXIT_CRASH
            return _fail(position, "another rank exited without reporting an error", cli.EXIT_CRASH)
        if reason := explain(error, position):
            return _fail(position, *reason, error.topic if isinstance(error, UserError) else "")
        if stop.received and position.step == position.saved:  # in the first step, Ctrl-C ends the compiler, too
            return _end(position, stop.received)
        traceback.print_exc()
        return _fail(position, traceback.format_exception_only(error)[0].splitlines()[0], cli.EXIT_CRASH)


def explain(error: Exception, position: Position) -> tuple[str, int] | None:
    """Explain an error that a user can fix, with its exit code.  Return None for a bug."""
    if gpu_error := device_errors.explain(error):
        return gpu_error
    if message := limits.explain(error):
        return message, limits.EXIT_CODE
    if message := deterministic.explain(error):
        return message, ConfigError.exit_code
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if distributed.world_size() > 1 and _TIMEOUT.search(str(error)):
        late = position.late_ranks.describe_late() or "the ranks wait for one another"
        step = position.step + 1
        return (
            f"step {step:,} has not ended for {position.late_ranks.stuck_s():.0f} s: {late}; the last checkpoint is "
            f"step {position.saved:,} (SSLX_STALL_S sets the limit in seconds)",
            RanksError.exit_code,
        )
    return None


def _end(position: Position, received: int | None) -> int:
    """Record that the run is done, or that it was saved after a signal, and return the exit code."""
    code = exit_code(received) if received else 0
    if distributed.rank() == 0 and (folder := position.owned):
        state, reason = (_state(received), signal.Signals(received).name) if received else ("done", "")
        records.write_status(folder, state, position.step, reason, code)
        if received:
            _print_last(position, last_lines.stopped(folder, *position.at, _cause(received)))
        else:
            lines = last_lines.finished_before if position.was_done else last_lines.finished
            _print_last(position, lines(folder, position.step))
    return code


def _state(received: int) -> records.State:
    """Return the state of a run that this signal has stopped."""
    return "stopped" if received == signal.SIGINT else "preempted"


def _cause(received: int) -> str:
    return "Ctrl-C" if received == signal.SIGINT else signal.Signals(received).name


def _print_last(position: Position, lines: Sequence[str]) -> None:
    """Print the last lines of the run on rank 0, below its display."""
    position.terminal.close()
    for line in lines:
        position.terminal.message(line)


def _acknowledge(position: Position, stop: StopSignals) -> None:
    """Handle the first stopping signal, in a thread.  Before the first step there is nothing to save or wait for."""
    position.late_ranks.stopping = stop.received
    if position.say:
        if _rank() == 0:
            if stop.received == signal.SIGINT:
                position.say("saving after this step; press Ctrl-C again to end now")
            else:
                position.say(f"{_cause(stop.received)}: saving after this step")
        return
    name = signal.Signals(stop.received).name
    try:
        if _rank() == 0:
            position.terminal.close()
            by = "" if stop.received == signal.SIGINT else f" by {name}"
            cli.note(f"interrupted{by} before the first step")
            if folder := position.owned:
                records.write_status(folder, _state(stop.received), position.saved, name, exit_code(stop.received))
                _print_last(position, last_lines.stopped(folder, *position.at, _cause(stop.received)))
        if position.lock:
            position.lock.release()
    finally:
        stop.leave(exit_code(stop.received))


def _report(position: Position) -> None:
    """Print the state of the run, in a thread, at SIGUSR1."""
    if _rank() == 0:
        say = position.say or cli.note
        where = f"step {position.step:,}" if position.say else "before the first step"
        late = position.late_ranks.describe_late()
        suffix = f": {late}" if late else ""
        stuck_s = position.late_ranks.stuck_s()
        say(f"{where}, checkpoint {position.saved:,}, {stuck_s:.1f} s since the last step{suffix}")


def _end_now(position: Position) -> None:
    """Record the end at a second Ctrl-C, in a thread, without waiting for the current step."""
    if _rank() == 0 and (folder := position.owned):
        saved = records.newest_step(folder)  # a save may be in progress
        records.write_status(folder, "stopped", saved, "SIGINT", exit_code(signal.SIGINT))
        _print_last(position, last_lines.stopped(folder, position.step, saved, "Ctrl-C"))


def _give_up(position: Position, stop: StopSignals, limit_s: float) -> None:
    """Report, in a thread, that a rank hangs and that this rank no longer waits for it."""
    if not position.late_ranks.speaks_for_all():
        return
    saved = records.newest_step(position.folder) if position.folder else 0  # rank 0 may hang in its save
    late, reason = position.late_ranks.describe_late(), signal.Signals(stop.received).name
    if late or position.step > position.saved:  # otherwise nothing is lost, for instance during compilation
        reason += f"; {late}, and" if late else ";"
        reason += f" no step ended in {limit_s:.0f} s"
        position.terminal.close()
        cli.complain(f"{reason}: giving up; the newest checkpoint is of step {saved:,}", exit_code(stop.received))
    if position.owned:
        records.write_status(position.owned, _state(stop.received), saved, reason, exit_code(stop.received))
        if _rank() == 0:
            _print_last(position, last_lines.stopped(position.owned, position.step, saved, _cause(stop.received)))


def _deadlock(position: Position, late: str) -> None:
    """End the run, in a thread of rank 0: the ranks wait for one another, until their collectives time out."""
    step, code = position.step + 1, RanksError.exit_code
    try:
        _fail(position, f"step {step:,} cannot end: {late}; the last checkpoint is step {position.saved:,}", code)
        if position.lock:
            position.lock.release()
    finally:
        interrupts.leave(code)


def _rank() -> int:
    """Return this process's rank, even before it has joined the others."""
    return environment.launched_rank() or 0


def lost_peer(error: Exception) -> bool:
    """Return whether a collective raised this error because another rank has ended."""
    return _PEER_ENDED.search(str(error)) is not None


def _fail(position: Position, reason: str, code: int, topic: str = "") -> int:
    if folder := position.owned:  # a folder that was deleted or belongs to another run gets no status
        records.write_status(folder, "failed", position.step, reason, code)
    position.terminal.close()
    cli.complain(reason, code, topic)
    if folder and code in _CAN_CONTINUE and _rank() == 0:
        _print_last(position, last_lines.failed(folder, position.saved))
    return code
