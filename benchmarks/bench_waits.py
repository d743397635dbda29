"""How long training waits in next(loader) for what the host prepares of a batch: in its own thread, or ahead of it.

    python benchmarks/run.py waits

Needs no GPU, and measures the host's part alone: order, draws, the crops' and colors' parameters, labels, all of it
packed for one copy, as the resident backend prepares 256 samples of SimCLR.  No CPU decodes or crops images at these
speeds: on a GPU, that is the device's part.  A consumer takes batches at the goals' speeds, 30,000 samples/s of 32 px
and 3,500 of 224 px, and sleeps between them, as a thread does that waits for a GPU; in turns with and without
``data.ahead``.
"""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import count

import fake_step
import numpy as np
import torch
from harness import Session, benchmark
from torch import Tensor

from sslx import config, data
from sslx.bench import measure
from sslx.data import sources
from sslx.data.ahead import ahead
from sslx.data.backends.resident import Resident
from sslx.data.facts import Facts
from sslx.data.planner import Planner
from sslx.data.transfer import pack
from sslx.distributed import Ranks

SAMPLES, CPU = 256, torch.device("cpu")
GOALS = {32: 30_000, 224: 3_500}
"""Side of the views -> samples/s."""


def host_part(side: int) -> Callable[[int], Tensor]:
    """Batch number t's work on the host, as for a GPU, up to the copy."""
    specs = fake_step.specs_of(config.load(["simclr_cifar10", "--device", "cuda"], gpu=True), side)
    pixels = np.random.default_rng().integers(0, 256, (2 * SAMPLES, side, side, 3), dtype=np.uint8)
    facts = Facts(num_samples=len(pixels), size=side, labels=np.arange(len(pixels)) % 10, classes=tuple("abcdefghij"))
    source = sources.Pixels(name="noise", facts=facts, pixels=pixels)
    settings, ranks = data.Config(backend="resident", threads=0), Ranks(device=CPU)
    loader = data.training(settings, source, specs, batch_size=SAMPLES, seed=0, ranks=ranks, dtype=torch.float32)
    backend = loader.backend
    assert isinstance(backend, Resident)
    next(loader)  # decodes
    loader.close()
    planner = Planner(order=loader.order, specs=specs, along=loader.along)

    def make(t: int) -> Tensor:
        work = planner(t)
        assert work is not None
        return pack(backend.prepare(work).staged.tensors, pinned=False)

    return make


def in_turn(make: Callable[[int], Tensor]) -> Generator[Tensor]:
    """Each batch when it is asked for."""
    yield from map(make, count())


def waits_ms(batches: Iterator[Tensor], period_s: float, steps: int) -> list[float]:
    """Of each step of a consumer that sleeps until its period is over."""
    waits: list[float] = []
    end = time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        next(batches)
        waits.append(1e3 * (time.perf_counter() - start))
        end = max(end + period_s, time.perf_counter())
        time.sleep(max(0.0, end - time.perf_counter()))
    return waits


@benchmark(windows=measure.WINDOWS)
def run(session: Session) -> None:
    """Measure the consumer at both speeds."""
    torch.set_num_threads(1)
    noise = measure.warn_of_noise(CPU, print)
    for side, speed in GOALS.items():
        make, period_s = host_part(side), SAMPLES / speed
        steps = max(10, round(1.0 / period_s))
        arms = {"in next": lambda make=make: in_turn(make), "ahead": lambda make=make: ahead(make, 0, CPU)}
        waits: dict[str, list[float]] = {name: [] for name in arms}
        for window in range(session.options.windows + 1):  # the first warms up
            for name, arm in arms.items():
                with closing(arm()) as batches:
                    next(batches)
                    times = waits_ms(batches, period_s, steps)
                waits[name] += times if window else []
        figures = {name: measure.summarize(values) for name, values in waits.items()}
        for name, summary in figures.items():
            print(f"{side} px  {name:8} {measure.text(summary, 3)} ms")
        session.record(side=side, samples=SAMPLES, samples_per_s=speed, wait_ms=figures, noise=noise)
