"""A recipe's step on fake CUDA tensors (``fake_cuda``): the functions that the loop calls, in the loop's order."""

from dataclasses import replace
from pathlib import Path

import fake_cuda
import torch

from sslx import encoders, log, methods, optim, sync_bn
from sslx.config import PretrainConfig
from sslx.data.batch import Batch
from sslx.data.views import ViewSpec
from sslx.group_norm import group_norm
from sslx.methods.base import Method
from sslx.train import finite
from sslx.train.step import cached_step, train_step

DEVICE, AUTOCAST = torch.device("cuda", 0), torch.bfloat16


def build(config: PretrainConfig, size: int) -> tuple[Method, tuple[ViewSpec, ...]]:
    """The method, on the CPU as yet, and its views."""
    file = methods.module(config.method.name)
    specs: tuple[ViewSpec, ...] = file.views(config.method, config.augment, size)
    norm = "group" if config.batch_norm == "group" else "batch"
    method: Method = file.Method(
        config.method, encoders.build(replace(config.encoder, weights=None), size, *(s.size for s in specs), norm=norm)
    )
    if config.batch_norm == "sync":
        sync_bn.sync_batch_norm(method)
    if config.batch_norm == "group":
        group_norm(method)
    return method, specs


class Run:
    """A run on the GPU that is not there; to be made and used within ``fake_cuda.on``.

    per_rank: samples of a step, in ``config.micro_batches`` batches.
    """

    def __init__(self, config: PretrainConfig, method: Method, specs: tuple[ViewSpec, ...], per_rank: int) -> None:
        self.config, self.method, self.specs = config, method, specs
        self.per_batch = per_rank // config.micro_batches
        fake_cuda.to_cuda(method)
        self.optimizer = optim.build(config.optim, method, method.param_groups())
        self.progress = torch.zeros((), device=DEVICE)
        self.meter = log.Meter()
        self.watch = finite.Watch(config.may_skip, Path("nowhere"), DEVICE, None)
        self.steps = 0

    def batches(self) -> list[Batch]:
        """What a loader leaves on the device."""
        number, draws = self.per_batch, self.method.num_draws
        return [
            Batch(
                tuple(
                    torch.empty(number, s.size, s.size, 3, device=DEVICE, dtype=AUTOCAST).permute(0, 3, 1, 2)
                    for s in self.specs
                ),
                torch.empty(number, dtype=torch.int64, device=DEVICE),
                torch.arange(number),
                torch.empty(number, draws, device=DEVICE) if draws else None,
            )
            for _ in range(self.config.micro_batches)
        ]

    def step(self, batches: list[Batch]) -> None:
        """All that the loop does in a step in which nothing is logged or saved."""
        optim.set_lr(self.optimizer, 0.1)
        self.progress.fill_(0.5)
        take = cached_step if self.config.grad_cache_chunks > 1 else train_step
        metrics = take(self.method, batches, self.optimizer, self.progress, AUTOCAST)
        self.method.after_step(finite.standing(self.progress, metrics["taken"]))
        self.meter.add(finite.counted(metrics))
        self.steps += 1
        self.watch.add(self.steps, metrics, batches)


def counts(config: PretrainConfig, size: int, per_rank: int) -> fake_cuda.Counts:
    """Of the second step: launches, copies, bytes moved, and the peak of memory, with parameters and optimizer."""
    method, specs = build(config, size)
    with fake_cuda.on(may_read=True) as found:
        run = Run(config, method, specs, per_rank)
        found.hold([*method.parameters(), *method.buffers()])
        run.step(run.batches())  # the first also makes the optimizer's state
        found.forget()
        run.step(run.batches())
    return found
