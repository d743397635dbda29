"""The training loop.  Reads top to bottom: build, resume, and step after step.

``sslx pretrain RECIPE`` (launch.py) starts the ranks; each of them runs ``pretrain``.
"""

import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sslx import distributed, log, optim, schedules
from sslx.config import PretrainConfig, dump
from sslx.data import Loader
from sslx.data.listing import silent
from sslx.distributed import Ranks
from sslx.errors import NonFiniteError
from sslx.probe.health import Health
from sslx.train import run as runs
from sslx.train.build import build, online_probe
from sslx.train.signals import StopSignals
from sslx.train.step import cached_step, train_step


@dataclass
class Position:
    """How far a run has come, for whoever reports its end: its folder once claimed, its last step, its last save."""

    folder: Path | None = None
    step: int = 0
    saved: int = 0


def pretrain(config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position) -> int:
    """Train to the end or to a stopping signal; returns the signal's number, 0 when done.

    Every rank calls this; ``position`` is kept up to date.  UserErrors where a user can mend what is wrong.
    """
    say = _print if ranks.is_main else silent
    parts = build(config, ranks, say)  # says what is about to happen before the run folder is there
    probe, health = online_probe(config, ranks, parts, say), Health(config.health, parts.autocast)
    run = runs.claim(config)
    position.folder, position.step, position.saved = run.folder, run.step, run.step
    runs.restore(run, config, parts)
    logger = log.Log(
        config.log, run.folder, ranks.is_main, parts.total_steps, run.step, run.id, {"config": dump(config)}
    )
    progress = torch.zeros((), device=ranks.device)
    run_step = cached_step if config.grad_cache_chunks > 1 else train_step
    meter, agreement, clock = log.Meter(), distributed.StopFlag(), Clock(config.batch_size)
    signal = 0

    with logger:
        for line in run.notes:  # before the first step, which may take long
            logger.message(line)
        parts.loader.say = logger.message if ranks.is_main else partial(_warn, ranks.rank)
        for step in range(run.step, parts.total_steps):
            share = (step + 0.5) / parts.total_steps
            lr = parts.peak_lr * schedules.warmup_cosine(share, warmup=config.optim.warmup)
            optim.set_lr(parts.optimizer, lr)
            progress.fill_(share)
            with clock.waiting():
                batches = [next(parts.loader) for _ in range(config.micro_batches)]
            meter.add(run_step(parts.model, batches, parts.optimizer, progress, parts.autocast))
            parts.method.after_step(progress)
            position.step = done = step + 1
            clock.steps += 1

            # What comes now and then; all ranks decide alike, so that collectives meet.
            signal = stop.heed(agreement.agreed(stop.received))
            ended = done == parts.total_steps
            save = ended or signal or _due(config.checkpoint.every, done)
            look = _due(config.health.every, done)
            if save or look or done % config.log.every == 0 or done == run.step + 1:
                numbers = _means(meter, parts.loader, ranks.device, position)
                numbers |= {"lr": lr, "epoch": done / parts.steps_per_epoch, **clock.read()}
                if look:
                    numbers |= health.look(parts.method.encoder, batches)
                    clock.restart()
                logger.log(done, numbers)
                if look and (warning := health.warning(done, numbers, position.saved)):
                    logger.message(warning)
            if probe and (ended or _due(config.online.every * parts.steps_per_epoch, done)):
                logger.log(done, {"knn": probe.accuracy(parts.method.encoder)})
                clock.restart()
            if save:
                runs.save(run, config, done, parts)
                position.saved = done
                clock.restart()
            if signal:
                break
        agreement.finish()
    return signal


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _print(line: str) -> None:
    """What is known before the display is up."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _warn(rank: int, line: str) -> None:
    """What only one of the other ranks knows; rank 0 says the rest."""
    sys.stderr.write(f"[rank {rank}] {line}\n")


def _means(meter: log.Meter, loader: Loader, device: torch.device, position: Position) -> dict[str, float]:
    """The metrics since the last time, over all ranks, and their unreadable images: the one wait for the device.

    NonFiniteError where the loss is no number.
    """
    means = meter.fetch(distributed.mean_over_ranks)
    if not math.isfinite(means["loss"]):
        raise NonFiniteError(
            f"the loss is {means['loss']} at step {position.step:,}: lower --optim.lr or take --precision fp32; "
            f"the last checkpoint, step {position.saved:,}, is from before"
        )
    bad = float(distributed.sum_over_ranks(torch.tensor(float(len(loader.bad)), device=device)))
    return means | ({"unreadable_images": bad} if bad else {})


class Clock:
    """Throughput since the last reading, and the share of the time spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Leave out what came since the last reading: a probe, a checkpoint."""
        self._since, self._waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._entered

    def read(self) -> dict[str, float]:
        """``samples_per_s`` over all ranks and ``data_wait`` in [0, 1], then start again."""
        spent = time.perf_counter() - self._since
        found = {"samples_per_s": self.steps * self._batch_size / spent, "data_wait": self._waited / spent}
        self.restart()
        return found
