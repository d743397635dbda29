"""The training loop.  Reads top to bottom: data, model, optimizer, restart, steps.

``sslx pretrain RECIPE`` (launch.py) starts the ranks; each of them runs ``pretrain``.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sslx import checkpoint, data, distributed, encoders, log, methods, optim, rng, schedules, sync_bn
from sslx.config import PretrainConfig, dump
from sslx.data import sources
from sslx.data.views import eval_view
from sslx.distributed import Ranks
from sslx.errors import MissingInput, NonFiniteError
from sslx.probe.online import OnlineProbe
from sslx.train import run as runs
from sslx.train.signals import StopSignals
from sslx.train.step import train_step


def precision(config: PretrainConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of parameters and inputs, dtype of autocast or None)."""
    choice = config.precision
    if choice == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        choice = "bf16" if fast else "fp32"
    table = {"fp64": (torch.float64, None), "fp32": (torch.float32, None), "bf16": (torch.float32, torch.bfloat16)}
    return table[choice]


@dataclass
class Position:
    """How far a run has come, for whoever reports its end: its folder once claimed, and its last step."""

    folder: Path | None = None
    step: int = 0


def pretrain(config: PretrainConfig, ranks: Ranks, stop: StopSignals, position: Position) -> int:
    """Train to the end or to a stopping signal; returns the signal's number, 0 when done.

    Every rank calls this; ``position`` is kept up to date.  UserErrors where a user can mend what is wrong.
    """
    device = ranks.device
    dtype, autocast = precision(config, device)
    torch.backends.cudnn.benchmark = True
    rng.seed_torch(config.seed)

    # Data: what to read, what to make of it, and how a probe will see it.
    source = sources.build(config.data, "pretrain")
    size = config.data.size or source.size
    method_file = methods.module(config.method.name)
    specs = method_file.views(config.method, config.augment, size)
    view = eval_view(config.data.eval_size or size)
    local_ranks = distributed.local_world_size()
    warnings: list[str] = []
    loader = data.training(
        config.data,
        source,
        specs,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=local_ranks,
        device=device,
        dtype=autocast or dtype,
        say=warnings.append,
    )
    steps_per_epoch = loader.batches_per_epoch // config.accumulate
    total = config.steps or config.epochs * steps_per_epoch

    # Model and optimizer.
    encoder = encoders.build(config.encoder, size)
    method = method_file.Method(config.method, encoder).to(device, dtype)
    if config.batch_norm == "sync":
        method = sync_bn.sync_batch_norm(method)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        method.embed = torch.compile(method.embed)
    model = distributed.wrap(method, device=device, sync_bn=config.batch_norm == "sync")
    optimizer = optim.build(config.optim, method, method.param_groups())
    peak = optim.peak_lr(config.optim, config.batch_size)

    # Restart: everything that follows is a function of (config, step).
    run = runs.claim(config)
    position.folder, position.step = run.folder, run.step
    runs.restore(run, model, optimizer, loader, config)
    probe = _online_probe(config, ranks, source, view, autocast or dtype, autocast)
    progress = torch.zeros((), device=device)
    meter, agreement = log.Meter(), distributed.StopFlag()
    logger = log.Log(config.log, run.folder, ranks.is_main, total, run.step, run.id, {"config": dump(config)})

    def save(step: int) -> None:
        if ranks.is_main:
            state = runs.snapshot(run, config, step, model, optimizer, loader, view)
            checkpoint.save(run.folder, step, state, config.checkpoint.keep)

    with logger:
        for note in (source.describe(), *_plan(config, ranks, size, total, steps_per_epoch, peak, dtype, autocast), *run.notes):
            logger.message(note)
        if ranks.is_main:
            log.write_status(run.folder, "running", run.step)
        since, waited, counted = time.perf_counter(), 0.0, run.step
        saved, signal = run.step, 0
        for step in range(run.step, total):
            lr = peak * schedules.warmup_cosine((step + 0.5) / total, warmup=config.optim.warmup)
            optim.set_lr(optimizer, lr)
            progress.fill_((step + 0.5) / total)
            start = time.perf_counter()
            batches = [next(loader) for _ in range(config.accumulate)]
            waited += time.perf_counter() - start
            meter.add(train_step(model, batches, optimizer, progress, autocast))
            method.after_step(progress)
            position.step = done = step + 1

            signal = agreement.agreed(stop.received)
            at_log = done % config.log.every == 0 or done == total or signal or done == run.step + 1
            at_save = done == total or signal or (config.checkpoint.every and done % config.checkpoint.every == 0)
            at_probe = probe and (done == total or done % (config.online.every * steps_per_epoch) == 0)
            if at_log or at_save:
                means = meter.fetch(distributed.mean_over_ranks)  # the one wait for the device
                if not math.isfinite(means["loss"]):
                    raise NonFiniteError(
                        f"the loss is {means['loss']} at step {done:,}: lower --optim.lr, or take --precision fp32; "
                        f"the last checkpoint, step {saved:,}, is from before"
                    )
                spent = time.perf_counter() - since
                speed = (done - counted) * config.batch_size / spent
                timing = {"lr": lr, "epoch": done / steps_per_epoch, "samples_per_s": speed, "data_wait": waited / spent}
                logger.log(done, {**means, **timing})
            if at_probe:
                logger.log(done, {"knn": probe.accuracy(encoder)})
            if at_save:
                save(done)
                saved = done
            for warning in warnings:
                logger.message(warning)
            warnings.clear()
            if at_log or at_save or at_probe:
                since, waited, counted = time.perf_counter(), 0.0, done
            if signal:
                break
        agreement.finish()
    return signal


def _online_probe(config, ranks, source, view, dtype, autocast) -> OnlineProbe | None:
    """The online probe, or None where there are no labels or none is asked for."""
    if not config.online.every or source.labels is None or len(source.classes or ()) < 2:
        return None
    try:
        test = sources.build(config.data, "test", classes=source.classes)
    except MissingInput:
        test = None

    def evaluation(split: sources.Source) -> data.Loader:
        return data.evaluation(
            replace(config.data, max_bad=1.0),
            split,
            view,
            batch_size=max(1, config.batch_size // ranks.world_size),
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_world_size=distributed.local_world_size(),
            device=ranks.device,
            dtype=dtype,
        )

    return OnlineProbe(config.online, source, test, evaluation, autocast, config.seed)


def _plan(config, ranks, size, total, steps_per_epoch, peak, dtype, autocast) -> list[str]:
    """What is about to happen, with the values that were derived rather than given."""
    kind = str(autocast or dtype).removeprefix("torch.")
    return [
        f"{config.method.name} on {config.encoder.name}, {size} px, {kind}, {ranks.world_size} x {ranks.device.type}",
        f"{total:,} steps of {config.batch_size} ({steps_per_epoch:,} an epoch), {config.optim.name} lr {peak:.4g}",
    ]
