"""``sslx bench RECIPE``: finds what limits a recipe on this machine, and tries the settings that may help."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sslx import data, distributed
from sslx.bench import measure
from sslx.config import PretrainConfig
from sslx.console.words import one_line, shown
from sslx.data.backends.torchvision import read
from sslx.data.batch import Batch
from sslx.data.sources import Pixels, Source
from sslx.distributed import Ranks
from sslx.errors import UserError
from sslx.machine import cores
from sslx.train.build import Parts, build, compiles, fast_bf16, lacks
from sslx.train.clock import DataWaits
from sslx.train.step import cached_step, train_step

ARMS = ("end to end", "step alone", "loader alone", "augmentation alone")
WINDOWS, WINDOW_S = 3, 2.0
TRIAL_WINDOWS = 3
DRAIN_S = 2.0
"""Longest time to use up prefetched batches before a window."""
NUM_DECODED = 64
"""Images that are held in memory for the arm "augmentation alone"."""
MIN_SHARE = 0.9
"""A run that reaches less than this share of the speed of its slower part is limited by both parts at once."""
MIN_GAIN = 1.03
"""Smallest gain for which a setting is recommended."""


class Workload:
    """A config, built on this rank, as four arms that each measure samples/s over a window.

    "end to end" does what a run does, "step alone" trains on a batch in memory, "loader alone" reads, decodes and
    augments, and "augmentation alone" starts from decoded images in memory.  The learning rate is 0, so that the
    weights stay as they are and every window does the same work.
    """

    def __init__(self, settings: PretrainConfig, ranks: Ranks, window_s: float = WINDOW_S) -> None:
        self.settings, self.ranks, self.window_s = settings, ranks, window_s
        self.parts: Parts = build(settings, ranks, lambda _: None)
        self._step = cached_step if settings.num_grad_cache_chunks > 1 else train_step
        self._waits = DataWaits.on(ranks.device)
        replace(self.parts.plan.schedule, peak_lr=0.0).apply(self.parts.optimizer, 0.0)
        self.batches = self._read()
        self.parts.loader.close()  # otherwise its threads keep filling their queues

    @property
    def num_views(self) -> int:
        """Views per sample."""
        return len(self.batches[0].views)

    def arms(self) -> dict[str, Callable[[], float]]:
        """Arms for ``measure.take_turns``, by name; each returns the samples/s of all ranks."""
        reading, augmenting = self.parts.loader, self._in_memory()

        def arm(call: Callable[[], object], loader: data.Loader | None) -> Callable[[], float]:
            def before() -> None:
                for other in (reading, augmenting):
                    other.close()  # so that no arm competes with the threads of another
                if loader:
                    self._drain(loader)

            rate = measure.rate_window(call, self.ranks.device, self.window_s, before)
            return lambda: rate() * self.settings.batch_size

        return {
            "end to end": arm(self.train, reading),
            "step alone": arm(self.step, None),
            "loader alone": arm(self._read, reading),
            "augmentation alone": arm(lambda: [next(augmenting) for _ in self.batches], augmenting),
        }

    def step(self) -> dict[str, Tensor]:
        """Take one optimizer step on the batches in memory and return its metrics."""
        return self._update(self.batches)

    def data_wait(self, steps: int) -> float:
        """Share of the time that ``steps`` steps of a run wait for the loader, as in a run's log."""
        self._drain(self.parts.loader)
        self.train()
        self._waits.restart()
        start = time.perf_counter()
        for _ in range(steps):
            self.train()
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return self._waits.late_s() / (time.perf_counter() - start)

    def peak_bytes(self) -> int:
        """Peak memory during two steps of a run: allocated on the GPU, or resident."""
        measure.reset_peak(self.ranks.device)
        for _ in range(2):
            self.train()
        return measure.peak_bytes(self.ranks.device)

    def flops(self) -> float:
        """Floating-point operations of the matrix products and convolutions in a step of all ranks."""
        with self.parts.method.eager(), FlopCounterMode(display=False) as counter:
            self.step()
        return float(counter.get_total_flops()) * self.ranks.world_size

    def matrix_dtype(self) -> torch.dtype:
        """The dtype of the large matrix products."""
        return self.parts.plan.input_dtype

    def close(self) -> None:
        """Stop the loader's threads."""
        self.parts.loader.close()

    def _read(self) -> list[Batch]:
        return [next(self.parts.loader) for _ in range(self.settings.batches_per_step)]

    def _drain(self, loader: data.Loader) -> None:
        threads = self.settings.data.threads or cores.per_process(self.ranks.local_world_size)
        next(loader)
        start = time.perf_counter()
        for _ in range(2 * threads + 1):  # DALI prefetches two batches, and each torchvision worker two
            if time.perf_counter() - start > DRAIN_S:  # a slow loader has used them up by now
                return
            next(loader)

    def _update(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        parts, clip = self.parts, self.settings.optim.clip
        return self._step(parts.model, batches, parts.optimizer, 0.5, parts.plan.autocast, clip)

    def train(self) -> None:
        """Take one step of a run: read a batch and update the weights."""
        with self._waits:
            batches = self._read()
        self._update(batches)

    def _in_memory(self) -> data.Loader:
        """Return the same loader, for images that are already decoded."""
        settings, source = self.parts.settings, self.parts.source
        return data.training(
            settings.data,
            decoded(source, settings.batch_size),
            self.parts.plan.views,
            batch_size=settings.batch_size,
            accumulate=settings.batches_per_step,
            seed=settings.seed,
            draw=self.parts.method.draw,
            text=self.parts.plan.text,
            ranks=self.ranks,
            dtype=self.parts.plan.input_dtype,
        )


def decoded(source: Source, at_least: int) -> Source:
    """Return a source with ``at_least`` decoded images in memory, which repeats a few images of ``source``."""
    few = [image.permute(1, 2, 0).contiguous().numpy() for image in _first_images(source)]
    pixels = np.empty(max(at_least, len(few)), dtype=object)
    for i in range(len(pixels)):
        pixels[i] = few[i % len(few)]
    captions = source.facts.captions and [source.facts.captions[i % len(few)] for i in range(len(pixels))]
    facts = replace(source.facts, num_samples=len(pixels), labels=None, captions=captions)
    return Pixels(name=source.name, facts=facts, pixels=pixels)


def limit(rates: dict[str, float]) -> str:
    """Say what limits a run, given the samples/s of each arm."""
    step, loader, whole = rates["step alone"], rates["loader alone"], rates["end to end"]
    slower, name = min((step, "the training step"), (loader, "the loader"))
    share = min(1.0, whole / slower)  # more than 1 is noise
    if share >= MIN_SHARE:
        other = (
            "Data loading does not slow it down" if name == "the training step" else "The training step waits for it"
        )
        return f"{name}. {other}: a run reaches {100 * share:.0f} % of its speed alone"
    return (
        f"{name}, and the cores that it shares with the other part: a run reaches {100 * share:.0f} % of the speed of "
        "the slower part, so the two compete for the same cores"
    )


def fit_into_memory(source: Source) -> bool:
    """Return whether the decoded images would take less than 2 GiB if all were as large as the largest of the first."""
    return len(source) * max(image.nbytes for image in _first_images(source)) < 2**31


def _first_images(source: Source) -> list[Tensor]:
    """Return the first readable images, each (3, H, W) uint8."""
    images: list[Tensor] = []
    for i in range(len(source)):
        try:
            images.append(read(source, i))
        except RuntimeError:  # a run reports and replaces it
            continue
        if len(images) == NUM_DECODED:
            break
    return images


def candidates(
    settings: PretrainConfig, ranks: Ranks, rates: dict[str, float], *, small: bool
) -> dict[str, PretrainConfig]:
    """Settings that may raise the limit, by their flags; those that change what is learned come last.

    rates: samples/s of each arm.  small: whether all images fit into memory.
    """
    cuda = ranks.device.type == "cuda"
    threads = settings.data.threads or cores.per_process(ranks.local_world_size)
    trials = dict[str, PretrainConfig]()
    starving = rates["loader alone"] < rates["step alone"] / MIN_SHARE
    if small and settings.data.backend not in ("resident", "synthetic") and (starving or not cuda):
        trials["--data.backend resident"] = replace(settings, data=replace(settings.data, backend="resident"))
    if starving:
        more = min(cores.per_process(1), 2 * threads)
        if more > threads:
            trials[f"--data.threads {more}"] = replace(settings, data=replace(settings.data, threads=more))
        if settings.data.backend == "torchvision":
            trials["--data.backend auto"] = replace(settings, data=replace(settings.data, backend="auto"))
    if rates["step alone"] < rates["loader alone"] / MIN_SHARE:
        if not cuda and threads > 1:
            trials["--data.threads 1"] = replace(settings, data=replace(settings.data, threads=1))
        half = cuda or fast_bf16(ranks.device)
        if half and settings.precision in ("fp32", "fp64"):
            trials["--precision bf16"] = replace(settings, precision="bf16")
        elif half and not cuda:  # casting small matrices can cost more than it saves
            trials["--precision fp32"] = replace(settings, precision="fp32")
        if not compiles(settings, ranks.device) and not lacks(ranks.device)[0]:
            trials["--compile on"] = replace(settings, compile="on")
        if cuda:
            trials[f"--batch-size {2 * settings.batch_size}"] = replace(settings, batch_size=2 * settings.batch_size)
    return trials


def main(settings: PretrainConfig) -> int:
    """Measure the arms, name the limit and try what may help; return the exit code."""
    ranks = distributed.init(settings.device)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())  # a terminal would break inside words
    devices = settings.ranks or (torch.cuda.device_count() if ranks.device.type == "cuda" else 1)
    if devices > 1:  # the share of one device, which can be measured by itself
        settings = replace(settings, ranks=1, batch_size=settings.batch_size // devices)
        console.print(f"measuring one of {devices} ranks with its share of the batch, {settings.batch_size}")
    rates, source = _measure(settings, ranks, console)
    trials = candidates(settings, ranks, rates, small=fit_into_memory(source))
    gains = {flags: _gain_shown(settings, other, ranks, flags, console) for flags, other in trials.items()}
    useful = [flags for flags, gain in gains.items() if gain >= MIN_GAIN]
    if useful:
        console.print(f"[bold]take {' '.join(useful)}[/]")
    elif trials:
        console.print("[bold]keep the settings:[/] none of the settings tried is faster")
    else:
        console.print("[bold]keep the settings:[/] there is nothing left to try")
    distributed.shutdown()
    return 0


def _measure(settings: PretrainConfig, ranks: Ranks, console: Console) -> tuple[dict[str, float], Source]:
    """Print the arms and the limit; return the median samples/s of each arm, and the source."""
    stamp = measure.stamp()
    machine = stamp["gpu"] or f"{stamp['cores']} cores of {stamp['cpu'].split(' (')[0]}"
    console.print(Text.assemble((shown(settings.name), "bold"), f", batch {settings.batch_size}, on {shown(machine)}"))
    noise = measure.warn_of_noise(ranks.device, lambda line: console.print(f"[yellow]{line}[/]"))
    with console.status("building") if console.is_terminal else nullcontext():
        workload = Workload(settings, ranks)
        rate = measure.matrix_rate(ranks.device, workload.matrix_dtype())
        operations = workload.flops()
    console.print(f"measuring {', '.join(ARMS)}: {WINDOWS} windows of {workload.window_s:g} s each, in turns")
    values = measure.take_turns(workload.arms(), WINDOWS)
    summaries = {name: measure.summarize(rates) for name, rates in values.items()}
    table = Table("", "samples/s", "p20 to p80", "views/s")
    for name, rates in summaries.items():
        views = "" if name == "augmentation alone" else f"{rates['median'] * workload.num_views:,.0f}"
        table.add_row(name, f"{rates['median']:,.0f}", f"{rates['p20']:,.0f} to {rates['p80']:,.0f}", views)
    console.print(table)
    medians = {name: float(rates["median"]) for name, rates in summaries.items()}
    mfu = operations * medians["step alone"] / settings.batch_size / rate
    console.print(
        f"a run waits for data {100 * workload.data_wait(5):.0f} % of the time; the step alone multiplies at "
        f"{100 * mfu:.0f} % of this machine's matrix rate ({rate / 1e12:.2f} TFLOP/s, "
        f"{str(workload.matrix_dtype()).removeprefix('torch.')}); peak memory {workload.peak_bytes() / 2**30:.2f} GiB; "
        f"machine's noise {100 * noise:.0f} %"
    )
    console.print(f"[bold]bottleneck: {limit(medians)}[/]")
    workload.close()
    return medians, workload.parts.source


def gain(
    settings: PretrainConfig, other: PretrainConfig, ranks: Ranks, windows: int = TRIAL_WINDOWS
) -> measure.Summary:
    """Summary of the samples/s of a run with ``other`` over those of a run with ``settings``, measured in turns."""
    workloads = Workload(settings, ranks), Workload(other, ranks)
    arms = {str(number): workload.arms()["end to end"] for number, workload in enumerate(workloads)}
    values = measure.take_turns(arms, windows)
    for workload in workloads:
        workload.close()
    return measure.summarize([b / a for a, b in zip(*values.values(), strict=True)])


def _gain_shown(settings: PretrainConfig, other: PretrainConfig, ranks: Ranks, flags: str, console: Console) -> float:
    """Print and return the median gain of other settings: 1 if it may be noise, 0 if they cannot run."""
    try:
        ratio = gain(settings, other, ranks)
    except (RuntimeError, UserError) as error:  # OutOfMemoryError is a RuntimeError, too
        console.print(f"tried {flags}: cannot run ({one_line(error) or type(error).__name__})", markup=False)
        return 0.0
    is_sure = ratio["p20"] > 1 or ratio["median"] < 1
    console.print(
        f"tried {flags}: {measure.text(ratio, 2)} x the samples/s"
        + ("" if is_sure else ": within the noise of this machine")
    )
    return float(ratio["median"]) if is_sure else 1.0
