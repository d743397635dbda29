"""The training loop.  Reads top to bottom: build, resume, and step after step.

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
from sslx.console.words import one_line
from sslx.data import Loader
from sslx.distributed import Ranks
from sslx.encoders import Encoder
from sslx.errors import NonFiniteError, UserError
from sslx.methods.base import Method
from sslx.monitor.health import Health
from sslx.monitor.online import OnlineProbe
from sslx.runs import log
from sslx.runs.lock import Lock
from sslx.train import consistency, finite, taking
from sslx.train import run as runs
from sslx.train.build import Parts, build, compiles, online_probe
from sslx.train.clock import Clock, watch_waits
from sslx.train.roll_call import RollCall
from sslx.train.signals import StopSignals
from sslx.train.step import cached_step, train_step
from sslx.train.stop_flag import StopFlag


@dataclass
class Position:
    """How far a run has come, for whoever reports its end: its folder once claimed, its last step, its last save.

    lock: the claim on the folder, which whoever reports the end releases after that.
    say: prints a line where the run's own are; not None once the first step has begun.
    roll_call: where this rank and the others stand.
    terminal: what rank 0 shows; not enabled on the others.
    was_done: the run had all its steps before this start.
    """

    folder: Path | None = None
    lock: Lock | None = None
    step: int = 0
    saved: int = 0
    say: Callable[[str], None] | None = None
    roll_call: RollCall = field(default_factory=RollCall)
    terminal: Terminal = field(default_factory=lambda: Terminal(enabled=False))
    was_done: bool = False

    @property
    def owned(self) -> Path | None:
        """The run folder while it is there and this run's."""
        return self.folder if self.lock and self.lock.is_valid else None

    @property
    def at(self) -> tuple[int, int]:
        """The last step and the last save."""
        return self.step, self.saved


class Setup(NamedTuple):
    """What a run keeps when it goes back to a checkpoint; flags that are on their way then arrive afterwards."""

    parts: Parts
    probe: OnlineProbe | None
    health: Health
    agreement: StopFlag
    peers: consistency.Peers


def pretrain(config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position) -> int:
    """Train to the end or to a stopping signal; returns the signal's number, 0 when done.

    Every rank calls this; ``position`` is kept up to date.  UserErrors where a user can mend what is wrong.
    """
    peers = consistency.check_start(config, ranks.device)
    say = position.terminal.message
    resumes = runs.call_on_main(lambda: runs.will_resume(config))
    # Says what is about to happen before the run folder is there.
    parts = build(config, ranks, say, initial_weights=not resumes)
    config = parts.settings
    if not resumes and (line := _few_steps(config, parts)):
        say(line)
    probe, health = online_probe(config, ranks, parts, say), Health(config.health, parts.plan.autocast)
    setup = Setup(parts, probe, health, StopFlag(), peers)
    watch_waits(parts.model)
    run = runs.claim(config)
    position.folder, position.lock, position.step, position.saved = run.folder, run.lock, run.step, run.step
    gone_back_to = 0
    while True:
        runs.restore(run, config, parts)  # of a finished run too: what does not fit it is refused
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
    """A line where a run on a user's own images is too short to expect much of it; else ""."""
    if not config.source.is_own or config.encoder.weights or parts.plan.total_steps >= presets.FEW_STEPS:
        return ""
    steps = f"{parts.plan.total_steps:,} step{'s' * (parts.plan.total_steps != 1)}"
    epochs = -(-presets.FEW_STEPS // parts.plan.steps_per_epoch)
    more = f"--steps {presets.FEW_STEPS}" if config.steps else f"--epochs {epochs}"
    return f"a short run of {steps}: features usually take {presets.FEW_STEPS} or more to become good ({more})"


def _advice(reason: str, config: PretrainConfig, position: Position) -> str:
    """The last line of a run that is not finite: why, what to change, and what is left."""
    skip = ", or go on with --on-nonfinite skip" if config.on_nonfinite == "stop" else ""
    left = (
        f"the last checkpoint, step {position.saved:,}, is from before" if position.saved else "there is no checkpoint"
    )
    return f"{reason}: lower --optim.lr or take --precision fp32{skip}; {left}"


def _train(
    config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position, setup: Setup, run: runs.Run
) -> int:
    """Train from where the run stands to the end or to a signal; finite.NotFinite, on all ranks, where it cannot."""
    parts, probe, health, agreement, peers = setup
    signal, rates = 0, dict[str, float]()
    run_step, clip = cached_step if config.num_grad_cache_chunks > 1 else train_step, config.optim.clip
    meter, clock = log.Meter(), Clock(config.batch_size, peers.hosts, ranks.device)
    watch = finite.Watch(config.may_skip, run.folder, ranks.device, parts.source.where)

    with _log(config, ranks, position.terminal, parts, run) as logger, distributed.steady_sizes():
        position.say = logger.message if ranks.is_main else partial(_warn, ranks.rank)
        taking.watch_for_stop(parts.loader, stop, agreement, position.say)
        for step in range(run.step, parts.plan.total_steps):
            with clock.waiting_for_data():
                batches = taking.next_batches(parts.loader, config.batches_per_step, agreement)
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

            # What comes now and then; all ranks decide alike, so that collectives meet.
            signal = stop.acknowledge(agreement.exchange(stop.received) if batches else agreement.receive())
            ended = done == parts.plan.total_steps
            save = done > position.saved and (ended or signal > 0 or _due(config.checkpoint.every, done))
            look = bool(batches) and (_due(config.health.every, done) or (ended and config.health.every > 0))
            tell = clock.steps > 0 and (save or look or done % config.log.every == 0 or done == run.step + 1)
            if not tell:
                watch.look(logger.message)
            else:
                clock.arrive()
                numbers = means(meter, parts.loader, ranks.device, watch, logger.message)
                numbers |= {**rates, "epoch": done / parts.plan.steps_per_epoch}
                numbers |= clock.read(logger.message, is_lost=ranks.is_main and not run.lock.is_valid)
                runs.check(run, clock.is_lost)
                if look:
                    numbers |= _measured("health", parts.method, partial(health.look, batches=batches), logger.message)
                    clock.restart()
                logger.log(done, numbers)
                _judge(health, parts.method, done, numbers, position.saved, ended, logger.message)
            if save:  # before what takes long or may fail
                consistency.check_weights(parts.method, parts.optimizer, done, peers, logger.message)
                runs.save(run, config, done, parts)
                position.saved = done
                clock.restart()
            if probe and batches and (ended or _due(config.online.every, done)):
                if found := _measured("online probe", parts.method, probe.look, logger.message):
                    logger.log(done, found)
                clock.restart()
            if signal:
                break
        agreement.receive()
    return signal


def _first_step(config: PretrainConfig, ranks: Ranks) -> str:
    """What the first step is busy with."""
    if not compiles(config, ranks.device):
        return "first step"
    return "first step: compiling" + ", half a minute the first time" * (ranks.device.type == "cpu")


def _log(config: PretrainConfig, ranks: Ranks, terminal: Terminal, parts: Parts, run: runs.Run) -> log.Log:
    settings = {"config": dump(config), "plan": parts.plan.as_json()}
    steps = parts.plan.total_steps, run.step
    logger = log.Log(config.log, run.folder, ranks.is_main, terminal, *steps, run.id, settings)
    for line in run.notes:  # before the first step, which may take long
        logger.message(line)
    return logger


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _measured(
    what: str, method: Method, measure: Callable[[Encoder], dict[str, float]], say: Callable[[str], None]
) -> dict[str, float]:
    """What ``measure`` makes of the exported encoder, with rank 0's running statistics on all ranks, as it is saved.

    Nothing, and a line, where it cannot: training goes on without it.
    """
    parallel.share_buffers(method)
    try:
        return measure(method.exported)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"no {what} this time: {one_line(error) or type(error).__name__}")
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
    """Say what the health of the features means, where it was looked at; CollapseError where that ends the run."""
    if "feature_rank" not in numbers:
        return
    if _due(health.every, step) and (line := health.warning(step, numbers, saved)):
        say(line)
    if ended and (line := health.last_word(step, numbers, method)):
        say(line)


def _warn(rank: int, line: str) -> None:
    """What only one of the other ranks knows; rank 0 says the rest."""
    sys.stderr.write(f"[rank {rank}] {line}\n")


def means(
    meter: log.Meter, loader: Loader, device: torch.device, watch: finite.Watch, say: Callable[[str], None]
) -> dict[str, float]:
    """The metrics since the last time, over all ranks, their unreadable images and steps that were not taken.

    Raises finite.NotFinite, as ``watch.look``: what both read comes from the device at once.
    """
    meter.add({"unreadable_images": torch.full((), float(len(loader.bad)), device=device)})
    numbers, verdicts = meter.fetch(distributed.mean_over_ranks, watch.pending())
    watch.judge(say, verdicts)
    bad = round(numbers.pop("unreadable_images") * distributed.world_size())
    counts = {"unreadable_images": float(bad), "skipped_steps": float(watch.skipped)}
    return finite.means(numbers) | {name: count for name, count in counts.items() if count}
