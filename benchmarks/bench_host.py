"""What one rank's host has to do in a step of SimCLR on CIFAR-10 from memory, on one core: 512 samples, ResNet-18.

    python benchmarks/bench_host.py

Needs no GPU.  Thread CPU time on one core, of two parts in turns:
- the loader's: order, draws, boxes, filters' and colors' parameters, labels, and all of it packed for one copy;
- the step's: Python and the dispatch of every operator, forward, backward, optimizer, checks and metrics, not compiled,
  on a copy of the method with 8 channels and 8 px, where the operators themselves take next to nothing.
To these come the launches, counted on fake CUDA tensors (``fake_step``), at ``LAUNCH_US`` each: a model, not measured.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fake_step
import numpy as np
import torch

from sslx import config, data, distributed
from sslx.bench import measure
from sslx.data import sources
from sslx.data.backends.resident import Resident
from sslx.data.transfer import pack
from sslx.runs import log
from sslx.train import finite
from sslx.train.build import build
from sslx.train.step import train_step

RESULTS = Path(__file__).parent / "results" / "host.jsonl"
LAUNCH_US = 3.0
"""Of the driver, for a kernel, beyond what PyTorch's dispatch takes on a CPU too: an assumption."""
GOAL_MS = 12.0
SAMPLES, SIDE = 512, 32
SMALL = "--data.source synthetic --data.size 8 --data.backend resident --batch-size 2 --device cpu --precision fp32"


def loader_part() -> Callable[[], object]:
    """One batch's work on the host, as ``Resident`` does it for a GPU, up to the copy."""
    settings = config.load(["simclr_cifar10", "--device", "cuda"], gpu=True)
    specs = fake_step.specs_of(settings, SIDE)
    pixels = np.random.default_rng().integers(0, 256, (4 * SAMPLES, SIDE, SIDE, 3), dtype=np.uint8)
    source = sources.Source("noise", SIDE, np.arange(len(pixels)) % 10, tuple("abcdefghij"), pixels=pixels)
    cpu = torch.device("cpu")
    options = data.Config(backend="resident", threads=0)
    loader = data.training(options, source, specs, batch_size=SAMPLES, seed=0, device=cpu, dtype=torch.float32)
    backend, order = loader.backend, loader.order
    assert isinstance(backend, Resident)
    next(loader)
    batches = iter(range(1, 1 << 30))

    def work() -> object:
        groups, _, _ = backend.prepared(order, next(batches), lambda index: index, loader.along)
        return pack(
            [{name: torch.from_numpy(array) for name, array in group.items()} for group in groups], pinned=False
        )

    return work


def step_part() -> Callable[[], object]:
    """One step's Python and dispatch."""
    narrow = [f"--encoder.{name}" for name in ("layers", "channels")]
    flags = ["simclr_cifar10", *SMALL.split(), narrow[0], *"2222", narrow[1], *"8888"]
    settings = config.load([*flags, "--method.hidden-dim", "8", "--method.projection-dim", "8"])
    parts = build(settings, distributed.init("cpu"), lambda _: None)
    batches, progress, meter = [next(parts.loader)], torch.zeros(()), log.Meter()
    schedule = replace(parts.schedule, peak_lr=1e-6)
    watch = finite.Watch(0, Path("nowhere"), torch.device("cpu"), None)  # never asked, as in most steps on a GPU

    def step() -> None:
        schedule.apply(parts.optimizer, 0.5)
        progress.fill_(0.5)
        metrics = train_step(parts.model, batches, parts.optimizer, progress, parts.autocast)
        parts.method.after_step(finite.standing(progress, metrics["taken"]))
        meter.add(finite.counted(metrics))
        watch.add(1, metrics, batches)

    return step


def cpu_ms(work: Callable[[], object], number: int) -> float:
    """Thread CPU time of one call."""
    start = time.thread_time()
    for _ in range(number):
        work()
    return 1e3 * (time.thread_time() - start) / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--calls", type=int, default=20, help="of a window")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = config.load(["simclr_cifar10", "--device", "cuda"], gpu=True)
    launches = fake_step.counts(settings, SIDE, SAMPLES).launches
    works = {"loader": loader_part(), "step": step_part()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for window in range(args.windows + 1):  # the first warms up
        for name, work in works.items():
            found = cpu_ms(work, args.calls)
            times[name] += [found] * (window > 0)
    spreads = {name: measure.summarize(values) for name, values in times.items()}
    launch_ms = launches * LAUNCH_US / 1e3
    total = launch_ms + sum(found["median"] for found in spreads.values())
    print(
        f"loader {spreads['loader']['median']:.1f} ms, step {spreads['step']['median']:.1f} ms, {launches} launches at "
        f"{LAUNCH_US:g} us: {launch_ms:.1f} ms; together {total:.1f} ms a step (goal: {GOAL_MS:g})"
    )
    record = {"loader_ms": spreads["loader"], "step_ms": spreads["step"], "launches": launches, "launch_us": LAUNCH_US}
    measure.append(args.results, {"benchmark": "host", "samples": SAMPLES, **record, "total_ms": total})


if __name__ == "__main__":
    main()
