"""Time and memory on the host for the order of the samples and for the draws of their views.

    python benchmarks/run.py order

At 10^4, 10^6 and 10^9 samples, in turns in one process: a batch of ``rng.permuted``, which computes only the positions
that are asked for; and, if they fit into memory, numpy's permutation of an epoch and the sort of random words that sslx
used before, each divided by the number of batches in an epoch.  The peak is that of allocated memory, including the
permutation of an epoch.  Then draws and boxes of SimCLR's two views at 32 px.
"""

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from harness import Session, benchmark, option

from sslx import rng
from sslx.bench import measure
from sslx.data import views
from sslx.data.augment import Augment
from sslx.data.views import ViewSpec

SIZES = (10**4, 10**6, 10**9)
BATCH_SIZE = 4096
SORTED_BYTES, NUMPY_BYTES = 60, 8
"""Bytes per sample of an epoch: peak of the sort of random words (measured at 10^6), and numpy's permutation."""
CPU = torch.device("cpu")


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of the memory that a call allocates."""
    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def orders(size: int, most_bytes: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Calls by name, each with the number of batches that it makes."""
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
    """A call that makes draws and boxes of a batch of SimCLR's two views of CIFAR-10."""
    spec = ViewSpec(size=32, augment=Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0))
    index = np.random.default_rng(0).integers(50_000, size=batch_size)
    side = np.full(batch_size, 32)

    def call() -> object:
        return [views.boxes(spec, drawn, side, side) for drawn in views.draws([spec, spec], 0, 1, index)]

    return call


def us_per_batch(session: Session, arms: dict[str, tuple[Callable[[], object], float]]) -> dict[str, measure.Summary]:
    """Microseconds per batch, by name."""
    options = session.options
    windows = {name: measure.rate_window(call, CPU, options.seconds) for name, (call, _) in arms.items()}
    rates = measure.take_turns(windows, options.windows)
    return {
        name: measure.summarize([1e6 / (rate * arms[name][1]) for rate in values]) for name, values in rates.items()
    }


@benchmark(
    option("--most-bytes", type=int, default=2**30, help="most memory that the permutation of an epoch may take"),
    windows=measure.WINDOWS,
    seconds=0.2,
)
def run(session: Session) -> None:
    noise = measure.warn_of_noise(CPU, print)
    for size in SIZES:
        arms = orders(size, session.options.most_bytes)
        microseconds = us_per_batch(session, arms)
        peaks = {name: peak_bytes(call) for name, (call, _) in arms.items()}
        for name, summary in microseconds.items():
            speed = BATCH_SIZE / summary["median"]
            print(
                f"10^{math.log10(size):.0f} {name:9} {summary['median']:9.1f} us per batch of {BATCH_SIZE:,}, "
                f"{speed:7.2f} M samples/s, peak {peaks[name] / 2**20:8.2f} MiB"
            )
        session.record(
            num_samples=size, batch_size=BATCH_SIZE, noise=noise, us_per_batch=microseconds, peak_bytes=peaks
        )
    for batch_size in (256, 4096):
        microseconds = us_per_batch(session, {"draws and boxes": (draw_views(batch_size), 1.0)})
        median = microseconds["draws and boxes"]["median"]
        print(f"two views of {batch_size:,}: {median:.0f} us, {batch_size / median:.2f} M samples/s")
        session.record(benchmark="draws", batch_size=batch_size, num_views=2, size_px=32, noise=noise,
                       us_per_batch=microseconds)  # fmt: skip
