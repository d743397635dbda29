"""The training loop, which reads from top to bottom: build, resume, and train step by step.

``sslx pretrain RECIPE`` (launch.py) starts the ranks; each of them runs ``pretrain``.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from sslx import distributed, parallel
from sslx.config import PretrainConfig, dump, presets
from sslx.console import activity
from sslx.console.display import Terminal
from sslx.console.words import one_line, plural
from sslx.data import Loader
from sslx.distributed import Ranks
from sslx.encoders import Encoder
from sslx.errors import NonFiniteError, UserError
from sslx.methods.base import Method
from sslx.monitor.health import Health
from sslx.monitor.online import OnlineProbe
from sslx.runs import log
from sslx.runs.lock import Lock
from sslx.train import consistency, finite
from sslx.train import run as runs
from sslx.train.build import Parts, build, compiles, online_probe
from sslx.train.clock import Clock, watch_waits
from sslx.train.late_ranks import LateRanks
from sslx.train.next_batches import next_batches, watch_for_stop
from sslx.train.plan import Plan
from sslx.train.signals import StopSignals
from sslx.train.step import cached_step, train_step
from sslx.train.stop_flag import StopFlag


@dataclass
class Position:
    """How far a run has come, for the code that reports its end.

    folder: the run folder, once it is claimed.  lock: the claim on it, released after the end is reported.
    step: the last step.  saved: the step of the last checkpoint, 0 if there is none.
    say: prints a line among the run's own; None until training begins.
    late_ranks: what this rank and the others are doing.
    terminal: the display of rank 0; it is disabled on the other ranks.
    was_done: whether the run had all its steps before this start.
    error: what ended the run, if an error did.
    goes_on: whether the program goes on after the run, so that no rank may return before rank 0 has saved.
    """

    folder: Path | None = None
    lock: Lock | None = None
    step: int = 0
    saved: int = 0
    say: Callable[[str], None] | None = None
    late_ranks: LateRanks = field(default_factory=LateRanks)
    terminal: Terminal = field(default_factory=lambda: Terminal(enabled=False))
    was_done: bool = False
    error: Exception | None = None
    goes_on: bool = False

    @property
    def owned(self) -> Path | None:
        """The run folder, or None unless it exists and belongs to this run."""
        return self.folder if self.lock and self.lock.is_valid else None

    @property
    def at(self) -> tuple[int, int]:
        """The last step and the step of the last checkpoint."""
        return self.step, self.saved


@dataclass(frozen=True)
class Due:
    """The periodic work that is due after a step; the same on all ranks."""

    end: bool
    save: bool
    health: bool
    log: bool
    probe: bool

    @classmethod
    def after(
        cls,
        position: Position,
        started_at: int,
        config: PretrainConfig,
        plan: Plan,
        stepped: bool,
        stopping: bool,
        unlogged: bool,
    ) -> "Due":
        """Return what is due after the step of ``position``.

        started_at: the step from which this start went on; the one after it is logged.  stepped: whether the last step
        was computed, not given up for a signal.  stopping: whether a signal ends the run here.  unlogged: whether there
        are steps that are not logged yet.
        """
        step, end = position.step, position.step == plan.total_steps
        save = step > position.saved and (end or stopping or _is_multiple(step, config.checkpoint.every))
        health = stepped and config.health.every > 0 and (end or _is_multiple(step, config.health.every))
        log = unlogged and (save or health or step == started_at + 1 or _is_multiple(step, config.log.every))
        probe = stepped and (end or _is_multiple(step, config.online.every))
        return cls(end=end, save=save, health=health, log=log, probe=probe)


def _is_multiple(step: int, every: int) -> bool:
    """Return whether a step is a multiple of ``every``; it never is if that is 0, which turns the work off."""
    return every > 0 and step % every == 0


class Setup(NamedTuple):
    """The parts that a run keeps when it goes back to a checkpoint, so that stop flags still under way arrive."""

    parts: Parts
    probe: OnlineProbe | None
    health: Health
    agreement: StopFlag
    peers: consistency.Peers


def pretrain(config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position) -> int:
    """Train to the end or until a signal stops the run; return the signal's number, or 0 at the end.

    Every rank calls this.  ``position`` is kept up to date.  Raises UserError for problems that the user can fix.
    """
    peers = consistency.check_start(config, ranks.device)
    say = position.terminal.message
    resumes = runs.call_on_main(lambda: runs.will_resume(config))
    # This prints the plan before the run folder exists.
    parts = build(config, ranks, say, initial_weights=not resumes)
    config = parts.settings
    if not resumes and (line := _few_steps(config, parts)):
        say(line)
    probe, health = online_probe(config, ranks, parts, say), Health(config.health, parts.plan.autocast)
    setup = Setup(parts, probe, health, StopFlag(), peers)
    watch_waits(parts.model)
    run = runs.claim(config)
    position.folder, position.lock, position.step, position.saved = run.folder, run.lock, run.step, run.step
    if run.step < parts.plan.total_steps:
        runs.note_start(run, ranks.device, peers.hosts)
    gone_back_to = 0
    while True:
        runs.restore(run, config, parts)  # also for a finished run, so that weights that do not fit are refused
        if run.step >= parts.plan.total_steps:
            position.was_done = True
            for line in run.notes:
                say(line)
            return 0
        consistency.check_weights(parts.method, parts.optimizer, run.step, peers, say)
        try:
            return _train(config, ranks, stop, position, setup, run)
        except finite.NotFinite as reason:  # on all ranks
            if config.on_nonfinite == "stop" or position.saved in (0, gone_back_to):
                raise NonFiniteError(_advice(str(reason), config, position)) from None
            run = runs.roll_back(run, str(reason))
            gone_back_to = position.step = position.saved = run.step


def _few_steps(config: PretrainConfig, parts: Parts) -> str:
    """Return a line if a run on the user's own images is too short for good features, or ""."""
    if not config.source.is_own or config.encoder.weights or parts.plan.total_steps >= presets.FEW_STEPS:
        return ""
    steps = plural(parts.plan.total_steps, "step")
    epochs = -(-presets.FEW_STEPS // parts.plan.steps_per_epoch)
    flag = f"--steps {presets.FEW_STEPS}" if config.steps else f"--epochs {epochs}"
    return f"a short run of {steps}: features usually take {presets.FEW_STEPS} or more to become good ({flag})"


def _advice(reason: str, config: PretrainConfig, position: Position) -> str:
    """Return the last line of a run that is not finite: the reason, what to change, and the last checkpoint."""
    skip = ", or go on with --on-nonfinite skip" if config.on_nonfinite == "stop" else ""
    checkpoint = "there is no checkpoint"
    if position.saved:
        checkpoint = f"the last checkpoint, step {position.saved:,}, is from before"
    return f"{reason}: lower --optim.lr or take --precision fp32{skip}; {checkpoint}"


def _train(
    config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position, setup: Setup, run: runs.Run
) -> int:
    """Train from the run's step to the end or to a signal.  Raises finite.NotFinite on all ranks if it cannot go on."""
    parts, probe, health, agreement, peers = setup
    signal, rates = 0, dict[str, float]()
    run_step, clip = cached_step if config.num_grad_cache_chunks > 1 else train_step, config.optim.clip
    meter, clock = log.Meter(), Clock(config.batch_size, peers.hosts, ranks.device)
    watch = finite.Watch(config.may_skip, run.folder, ranks.device, parts.source.where)

    with _log(config, ranks, position.terminal, parts, run) as logger, distributed.steady_sizes():
        position.say = logger.message if ranks.is_main else partial(_warn, ranks.rank)
        watch_for_stop(parts.loader, stop, agreement, position.say)
        for step in range(run.step, parts.plan.total_steps):
            with clock.waiting_for_data():
                batches = next_batches(parts.loader, config.batches_per_step, agreement)
            if batches:
                progress = (step + 0.5) / parts.plan.total_steps
                rates = parts.plan.schedule.apply(parts.optimizer, progress)
                with activity.doing(_first_step(config, ranks)) if step == run.step else nullcontext():
                    metrics = run_step(parts.model, batches, parts.optimizer, progress, parts.plan.autocast, clip)
                meter.add(finite.counted(metrics))
                watch.add(step + 1, metrics, batches)
                clock.steps += 1
            position.step = done = step + bool(batches)
            logger.advance(done)

            # Periodic work.  All ranks take the same branches, so that their collectives match.
            signal = stop.acknowledge(agreement.exchange(stop.received) if batches else agreement.receive())
            unlogged = clock.steps > 0
            due = Due.after(position, run.step, config, parts.plan, bool(batches), signal > 0, unlogged)
            if not due.log:
                watch.look(logger.message)
            else:
                clock.arrive()
                numbers = means(meter, parts.loader, ranks.device, watch, logger.message)
                numbers |= {**rates, "epoch": done / parts.plan.steps_per_epoch}
                numbers |= clock.read(logger.message, is_lost=ranks.is_main and not run.lock.is_valid)
                runs.check(run, clock.is_lost)
                if due.health:
                    look = partial(health.look, batches=batches)
                    numbers |= _measure("health", parts.method, look, logger.message)
                    clock.restart()
                logger.log(done, numbers)
                _judge(health, parts.method, done, numbers, position.saved, due.end, logger.message)
            if due.save:  # before the online probe, which takes long and may fail
                consistency.check_weights(parts.method, parts.optimizer, done, peers, logger.message)
                runs.save(run, config, done, parts)
                position.saved = done
                clock.restart()
            if probe and due.probe:
                if accuracy := _measure("online probe", parts.method, probe.look, logger.message):
                    logger.log(done, accuracy)
                clock.restart()
            if signal:
                break
        agreement.receive()
    return signal


def _first_step(config: PretrainConfig, ranks: Ranks) -> str:
    """Return what the display shows during the first step."""
    if not compiles(config, ranks.device):
        return "first step"
    if ranks.device.type == "cpu":
        return "first step: compiling, half a minute the first time"
    return "first step: compiling"


def _log(config: PretrainConfig, ranks: Ranks, terminal: Terminal, parts: Parts, run: runs.Run) -> log.Log:
    settings = {"config": dump(config), "plan": parts.plan.as_json()}
    steps = parts.plan.total_steps, run.step
    logger = log.Log(config.log, run.folder, ranks.is_main, terminal, *steps, run.id, settings)
    for line in run.notes:  # now, because the first step may take long
        logger.message(line)
    return logger


def _measure(
    name: str, method: Method, measure: Callable[[Encoder], dict[str, float]], say: Callable[[str], None]
) -> dict[str, float]:
    """Return the metrics that ``measure`` takes of the exported encoder, as it is saved: with rank 0's statistics.

    If that fails, say so and return none: training goes on without them.
    """
    parallel.share_buffers(method)
    try:
        return measure(method.exported)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"no {name} this time: {one_line(error) or type(error).__name__}")
        return {}


def _judge(
    health: Health,
    method: Method,
    step: int,
    numbers: Mapping[str, float],
    saved: int,
    ended: bool,
    say: Callable[[str], None],
) -> None:
    """Warn if the health of the features, where it was measured, is bad; raise CollapseError if that ends the run."""
    if "feature_rank" not in numbers:
        return
    if _is_multiple(step, health.every) and (line := health.warning(step, numbers, saved)):
        say(line)
    if ended and (line := health.last_word(step, numbers, method)):
        say(line)


def _warn(rank: int, line: str) -> None:
    """Print a line that only this rank knows; rank 0 prints all others."""
    sys.stderr.write(f"[rank {rank}] {line}\n")


def means(
    meter: log.Meter, loader: Loader, device: torch.device, watch: finite.Watch, say: Callable[[str], None]
) -> dict[str, float]:
    """Return the mean metrics over the steps since the last call and over all ranks.

    The numbers of unreadable images and of skipped steps are added where they are not 0.  Raises finite.NotFinite as
    ``watch.look`` does.
    """
    numbers, verdicts = _fetch(meter, loader, device, watch)
    watch.judge(say, verdicts)
    counts = {"unreadable_images": numbers.pop("unreadable_images"), "skipped_steps": float(watch.skipped)}
    return finite.means(numbers) | {name: count for name, count in counts.items() if count}


def _fetch(
    meter: log.Meter, loader: Loader, device: torch.device, watch: finite.Watch
) -> tuple[dict[str, float], list[float]]:
    """Fetch the metrics and the verdicts that ``watch`` waits for from the device, in one copy."""
    meter.add({"unreadable_images": torch.full((), float(len(loader.bad)), device=device)})
    numbers, verdicts = meter.fetch(distributed.mean_over_ranks, watch.pending())
    numbers["unreadable_images"] = float(round(numbers["unreadable_images"] * distributed.world_size()))
    return numbers, verdicts
