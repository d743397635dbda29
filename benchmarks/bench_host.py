"""CPU time of one rank's host in a step of SimCLR on CIFAR-10 from memory, on one core: 512 samples, ResNet-18.

    python benchmarks/run.py host

Needs no GPU.  Two parts take turns, in thread CPU time on one core:
- the loader: order, draws, boxes, parameters of filters and colors, labels, and packing all of it for one copy;
- the step: Python and the dispatch of every operator, forward, backward, optimizer, checks and metrics, uncompiled, on
  a copy of the method with 8 channels and 8 px, where the operators themselves take almost no time.
Launches, counted on fake CUDA tensors (``fake_step``), are added at ``LAUNCH_US`` each: that part is a model.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import fake_step
import images
import numpy as np
import torch
from harness import Session, benchmark, option

from sslx import config, data, distributed
from sslx.bench import measure
from sslx.data import sources
from sslx.data.backends.resident import Resident
from sslx.data.facts import Facts
from sslx.data.planner import Planner
from sslx.data.transfer import pack
from sslx.distributed import Ranks
from sslx.runs import log
from sslx.train import finite
from sslx.train.build import build
from sslx.train.step import train_step

LAUNCH_US = 3.0
"""Assumed time of the driver per kernel, beyond that of PyTorch's dispatch."""
GOAL_MS = 12.0
SAMPLES, SIDE = 512, 32
SMALL = "--data.size 8 --data.backend resident --batch-size 2 --device cpu --precision fp32"


def loader_part() -> Callable[[], object]:
    """A call that prepares one batch on the host, as ``Resident`` does for a GPU, up to the copy."""
    settings = config.load(["simclr_cifar10", "--device", "cuda"], gpu=True)
    specs = fake_step.specs_of(settings, SIDE)
    pixels = np.random.default_rng().integers(0, 256, (4 * SAMPLES, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(len(pixels)) % 10
    facts = Facts(num_samples=len(pixels), size=SIDE, labels=labels, classes=tuple("abcdefghij"))
    source = sources.Pixels(name="noise", facts=facts, pixels=pixels)
    cpu = torch.device("cpu")
    options = data.Config(backend="resident", threads=0)
    loader = data.training(
        options, source, specs, batch_size=SAMPLES, seed=0, ranks=Ranks(device=cpu), dtype=torch.float32
    )
    backend = loader.backend
    assert isinstance(backend, Resident)
    planner = Planner(order=loader.order, specs=specs, along=loader.along)
    next(loader)
    batches = iter(range(1, 1 << 30))

    def work() -> object:
        work = planner(next(batches))
        assert work is not None
        return pack(backend.prepare(work).staged.tensors, pinned=False)

    return work


def step_part() -> Callable[[], object]:
    """A call that takes one tiny step."""
    narrow = [f"--encoder.{name}" for name in ("layers", "channels")]
    flags = ["simclr_cifar10", *images.flags("synthetic"), *SMALL.split(), narrow[0], *"2222", narrow[1], *"8888"]
    settings = config.load([*flags, "--method.hidden-dim", "8", "--method.projection-dim", "8"])
    parts = build(settings, distributed.init("cpu"), lambda _: None)
    batches, meter = [next(parts.loader)], log.Meter()
    schedule = replace(parts.plan.schedule, peak_lr=1e-6)
    watch = finite.Watch(0, Path("nowhere"), torch.device("cpu"), str)  # not read, as in most steps on a GPU

    def step() -> None:
        schedule.apply(parts.optimizer, 0.5)
        metrics = train_step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast)
        meter.add(finite.counted(metrics))
        watch.add(1, metrics, batches)

    return step


def cpu_ms(work: Callable[[], object], number: int) -> float:
    """Thread CPU time of one call, in milliseconds."""
    start = time.thread_time()
    for _ in range(number):
        work()
    return 1e3 * (time.thread_time() - start) / number


@benchmark(option("--calls", type=int, default=20, help="number of calls in a window"), windows=measure.WINDOWS)
def run(session: Session) -> None:
    options = session.options
    torch.set_num_threads(1)
    settings = config.load(["simclr_cifar10", "--device", "cuda"], gpu=True)
    launches = fake_step.counts(settings, SIDE, SAMPLES).launches
    works = {"loader": loader_part(), "step": step_part()}
    arms = {name: partial(cpu_ms, work, options.calls) for name, work in works.items()}
    ms = {name: measure.summarize(values) for name, values in measure.take_turns(arms, options.windows).items()}
    launch_ms = launches * LAUNCH_US / 1e3
    total_ms = launch_ms + ms["loader"]["median"] + ms["step"]["median"]
    print(
        f"loader {ms['loader']['median']:.1f} ms, step {ms['step']['median']:.1f} ms, {launches} launches at "
        f"{LAUNCH_US:g} us: {launch_ms:.1f} ms; together {total_ms:.1f} ms per step (goal: {GOAL_MS:g} ms)"
    )
    session.record(samples=SAMPLES, loader_ms=ms["loader"], step_ms=ms["step"], launches=launches,
                   launch_us=LAUNCH_US, total_ms=total_ms)  # fmt: skip
