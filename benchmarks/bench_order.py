"""The time and memory that the host spends on the order of the samples and on the draws of their views.

    python benchmarks/bench_order.py

At 10^4, 10^6 and 10^9 samples, in turns in one process: a batch of ``rng.permuted``, which is computed where it is
asked for; numpy's permutation of an epoch, and the sort of random words that sslx used before, as a share of an epoch
for each batch, where they fit into memory.  The peak is of what is allocated, an epoch's permutation included.  Then
draws and boxes of SimCLR's two views at 32 px.
"""

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslx import rng
from sslx.bench import measure
from sslx.data import views
from sslx.data.augment import Augment
from sslx.data.views import ViewSpec

RESULTS = Path(__file__).parent / "results" / "order.jsonl"
SIZES = (10**4, 10**6, 10**9)
BATCH_SIZE = 4096
SORTED_BYTES, NUMPY_BYTES = 60, 8
"""For each sample of an epoch: the peak of the sort of random words (measured at 10^6), and numpy's permutation."""
CPU = torch.device("cpu")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that a call has allocated at one time."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def orders(size: int, most_bytes: int) -> dict[str, tuple[Callable[[], object], float]]:
    """By name: a call, and how many batches it makes."""
    random, batches = np.random.default_rng(0), size / BATCH_SIZE
    at_once = min(BATCH_SIZE, size)

    def permuted() -> object:
        start = int(random.integers(size - at_once + 1))
        positions = np.arange(start, start + at_once)
        return rng.permuted(0, "benchmark", 0, size=size, positions=positions)

    arms: dict[str, tuple[Callable[[], object], float]] = {"permuted": (permuted, at_once / BATCH_SIZE)}
    if size * NUMPY_BYTES < most_bytes:
        arms["numpy"] = (lambda: random.permutation(size), batches)
    if size * SORTED_BYTES < most_bytes:
        arms["sort"] = (lambda: rng.permutation(0, "benchmark", int(random.integers(2**32)), size=size), batches)
    return arms


def draw_views(batch_size: int) -> Callable[[], object]:
    """Draws and boxes of a batch of SimCLR's two views of CIFAR-10."""
    spec = ViewSpec(size=32, augment=Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0))
    index = np.random.default_rng(0).integers(50_000, size=batch_size)
    side = np.full(batch_size, 32)

    def call() -> object:
        return [views.boxes(spec, drawn, side, side) for drawn in views.draws([spec, spec], 0, 1, index)]

    return call


def measured(arms: dict[str, tuple[Callable[[], object], float]], args: argparse.Namespace) -> dict[str, Any]:
    """By name: microseconds a batch, by the clock."""
    windows = {name: measure.rate_window(call, CPU, args.seconds) for name, (call, _) in arms.items()}
    rates = measure.take_turns(windows, args.windows)
    return {name: measure.summarize([1e6 / (rate * arms[name][1]) for rate in values]) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=measure.WINDOWS)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a window")
    parser.add_argument("--most-bytes", type=int, default=2**30, help="that an epoch's permutation may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    began, noise = time.monotonic(), measure.warn_of_noise(CPU, print)
    for size in SIZES:
        arms = orders(size, args.most_bytes)
        microseconds = measured(arms, args)
        peaks = {name: peak_bytes(call) for name, (call, _) in arms.items()}
        for name, spread in microseconds.items():
            speed = BATCH_SIZE / spread["median"]
            print(
                f"10^{math.log10(size):.0f} {name:9} {spread['median']:9.1f} us a batch of {BATCH_SIZE:,}, "
                f"{speed:7.2f} M samples/s, peak {peaks[name] / 2**20:8.2f} MiB"
            )
        record = {"benchmark": "order", "num_samples": size, "batch_size": BATCH_SIZE, "noise": noise}
        measure.append(args.results, {**record, "us_per_batch": microseconds, "peak_bytes": peaks})
    for batch_size in (256, 4096):
        microseconds = measured({"draws and boxes": (draw_views(batch_size), 1.0)}, args)
        median = microseconds["draws and boxes"]["median"]
        print(f"two views of {batch_size:,}: {median:.0f} us, {batch_size / median:.2f} M samples/s")
        record = {"benchmark": "draws", "batch_size": batch_size, "num_views": 2, "size_px": 32, "noise": noise}
        measure.append(args.results, {**record, "us_per_batch": microseconds})
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
