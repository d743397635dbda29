"""A recipe's step on fake CUDA tensors (``fake_cuda``): the functions that the loop calls, in the loop's order."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fake_cuda
import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from sslx import data, distributed, encoders, methods, optim
from sslx.config import PretrainConfig
from sslx.data import sources
from sslx.data.batch import Batch
from sslx.data.facts import Facts
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.methods.base import Method
from sslx.runs import log
from sslx.train import finite
from sslx.train.step import cached_step, train_step

DEVICE, AUTOCAST = torch.device("cuda", 0), torch.bfloat16


def specs_of(config: PretrainConfig, size: int) -> tuple[ViewSpec, ...]:
    """The views that the method needs."""
    return config.method.inputs(config.augment, size).views


def build(config: PretrainConfig, size: int) -> tuple[Method, tuple[ViewSpec, ...]]:
    """The method, still on the CPU, and its views."""
    specs = specs_of(config, size)
    trunk = replace(config.encoder, weights=None)
    encoder = encoders.build(trunk, size, *(spec.size for spec in specs), norm=config.norm)
    return methods.build(config.method, encoder), specs


class Run:
    """A run on a fake GPU; use it within ``fake_cuda.on``.

    per_rank: samples per step, in ``config.batches_per_step`` batches.
    """

    def __init__(self, config: PretrainConfig, method: Method, specs: tuple[ViewSpec, ...], per_rank: int) -> None:
        self.config, self.method, self.specs = config, method, specs
        self.per_batch = per_rank // config.batches_per_step
        fake_cuda.to_cuda(method)
        self.optimizer = optim.build(config.optim, method, method.encoder.trunk)
        self.schedule = optim.Schedule.of(config.optim, per_rank)
        self.meter = log.Meter()
        self.watch = finite.Watch(config.may_skip, Path("nowhere"), DEVICE, str)
        self.steps = 0
        self._loader = self._loader_of(np.random.default_rng())

    def _loader_of(self, generator: np.random.Generator) -> data.Loader:
        """A loader of random images as large as the largest view."""
        number, side = self.per_batch * self.config.batches_per_step, max(spec.size for spec in self.specs)
        pixels = generator.integers(0, 256, (1, side, side, 3), dtype=np.uint8).repeat(number, 0)
        facts = Facts(num_samples=number, size=side, labels=np.arange(number) % 2, classes=("a", "b"))
        source = sources.Pixels(name="noise", facts=facts, pixels=pixels)
        settings = replace(self.config.data, backend="resident", threads=0)
        return data.training(
            settings,
            source,
            self.specs,
            batch_size=self.per_batch * self.config.batches_per_step,
            accumulate=self.config.batches_per_step,
            seed=0,
            draw=self.method.draw,
            ranks=Ranks(device=DEVICE),
            dtype=AUTOCAST,
        )

    def batches(self) -> list[Batch]:
        """The batches of the next step, by the loader's own code, from images in the GPU's memory."""
        return [next(self._loader) for _ in range(self.config.batches_per_step)]

    def step(self) -> None:
        """Do what the loop does in a step that logs and saves nothing."""
        batches = self.batches()
        self.schedule.apply(self.optimizer, 0.5)
        take = cached_step if self.config.num_grad_cache_chunks > 1 else train_step
        metrics = take(self.method, batches, self.optimizer, 0.5, AUTOCAST, self.config.optim.clip)
        self.meter.add(finite.counted(metrics))
        self.steps += 1
        self.watch.add(self.steps, metrics, batches)


@contextmanager
def ranks(world_size: int) -> Generator[None]:
    """Be rank 0 of ``world_size`` ranks; collectives return results of the right shape and send nothing."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with mock.patch("sslx.distributed.check_same"):
            yield
    finally:
        distributed.shutdown()


def counts(config: PretrainConfig, size: int, per_rank: int, world_size: int = 1) -> fake_cuda.Counts:
    """Counts of the second step.  Its peak of memory includes what is allocated before it.

    With several ranks, this is one of them, without DDP, whose buckets are copied once more.
    """
    method, specs = build(config, size)
    with ranks(world_size), fake_cuda.on(may_read=True) as counted:
        run = Run(config, method, specs, per_rank)
        counted.hold([*method.parameters(), *method.buffers()])
        run.step()  # the first step also creates the state of the optimizer
        counted.forget()
        run.step()
    return counted
