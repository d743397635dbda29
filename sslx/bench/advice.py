"""``sslx bench RECIPE``: what limits a recipe on this machine, and the settings that would help, tried and measured."""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
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
from sslx.data.sources import Source
from sslx.distributed import Ranks
from sslx.errors import UserError
from sslx.machine import cores
from sslx.train.build import Parts, build, compiles, fast_bf16, lacks
from sslx.train.clock import DataWaits
from sslx.train.step import cached_step, train_step

ARMS = ("end to end", "step alone", "loader alone", "augmentation alone")
WINDOWS, WINDOW_S = 3, 2.0
TRY_WINDOWS = 3
DRAIN_S = 2.0
"""What was prefetched before a window is used up, for so long at most."""
DECODED = 64  # images held in memory for the augmentation alone
LIMITING = 0.9
"""Of the slower of its parts: a run that reaches less is held up by both at once."""
WORTH = 1.03
"""A setting is advised from this gain on."""


class Recipe:
    """A recipe, built on this rank, and its four arms.  Each gives batches/s x batch size = samples/s over a window.

    "step alone" trains on a batch in memory, "loader alone" reads, decodes and augments, "augmentation alone" starts
    from decoded images in memory, "end to end" is what a run does.  Weights stand still (a learning rate of 0), so
    that all windows see the same work.
    """

    def __init__(self, settings: PretrainConfig, ranks: Ranks, window_s: float = WINDOW_S) -> None:
        self.settings, self.ranks, self.window_s = settings, ranks, window_s
        self.parts: Parts = build(settings, ranks, lambda _: None)
        self._progress = torch.full((), 0.5, device=ranks.device)
        self._step = cached_step if settings.grad_cache_chunks > 1 else train_step
        self._waits = DataWaits.on(ranks.device)
        replace(self.parts.plan.schedule, peak_lr=0.0).apply(self.parts.optimizer, 0.0)
        self.batches = self._read()
        self.parts.loader.close()  # its threads would go on filling their queues

    @property
    def views(self) -> int:
        """Views of a sample."""
        return len(self.batches[0].views)

    def arms(self) -> dict[str, Callable[[], float]]:
        """What ``measure.take_turns`` takes: name -> samples/s of all ranks."""
        reading, augmenting = self.parts.loader, self._in_memory()

        def arm(call: Callable[[], object], loader: data.Loader | None) -> Callable[[], float]:
            def before() -> None:
                for other in (reading, augmenting):
                    other.close()  # no arm computes beside another one's threads
                if loader:
                    self._drain(loader)

            rate = measure.window(call, self.ranks.device, self.window_s, before)
            return lambda: rate() * self.settings.batch_size

        return {
            "end to end": arm(self.train, reading),
            "step alone": arm(self.step, None),
            "loader alone": arm(self._read, reading),
            "augmentation alone": arm(lambda: [next(augmenting) for _ in self.batches], augmenting),
        }

    def step(self) -> dict[str, Tensor]:
        """One optimizer step on the batches in memory; its metrics."""
        return self._update(self.batches)

    def data_wait(self, steps: int) -> float:
        """The share of the time that a run of some steps waits for its loader, as a run's log has it."""
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
        """Memory at its peak during two steps of a run: on the GPU, or resident."""
        measure.reset_peak(self.ranks.device)
        for _ in range(2):
            self.train()
        return measure.peak_bytes(self.ranks.device)

    def flops(self) -> float:
        """Floating-point operations of a step, of matrix products and convolutions, on all ranks."""
        with self.eager(), FlopCounterMode(display=False) as counter:
            self.step()
        return float(counter.get_total_flops()) * self.ranks.world_size

    @contextmanager
    def eager(self) -> Generator[None]:
        """Nothing is compiled: what hides what it does from whoever counts."""
        compiled = self.parts.method.__dict__.pop("embed", None)
        yield
        if compiled is not None:
            self.parts.method.embed = compiled

    def matrix_dtype(self) -> torch.dtype:
        """Of the large products."""
        return self.parts.plan.input_dtype

    def close(self) -> None:
        """Stop the loader's threads."""
        self.parts.loader.close()

    def _read(self) -> list[Batch]:
        return [next(self.parts.loader) for _ in range(self.settings.micro_batches)]

    def _drain(self, loader: data.Loader) -> None:
        threads = self.settings.data.threads or cores.per_process(distributed.local_world_size())
        next(loader)
        start = time.perf_counter()
        for _ in range(2 * threads + 1):  # DALI makes two batches in advance, torchvision's workers two each
            if time.perf_counter() - start > DRAIN_S:  # a slow loader has none in advance by now
                return
            next(loader)

    def _update(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        parts, clip = self.parts, self.settings.optim.clip
        found = self._step(parts.model, batches, parts.optimizer, self._progress, parts.plan.autocast, clip)
        parts.method.after_step(self._progress)
        return found

    def train(self) -> None:
        """One step of a run: read and update."""
        with self._waits:
            batches = self._read()
        self._update(batches)

    def _in_memory(self) -> data.Loader:
        """The same loader on images that are decoded already."""
        settings, source = self.parts.settings, self.parts.source
        return data.training(
            settings.data,
            decoded(source, settings.batch_size),
            self.parts.plan.views,
            batch_size=settings.batch_size,
            accumulate=settings.micro_batches,
            seed=settings.seed,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            local_world_size=distributed.local_world_size(),
            device=self.ranks.device,
            dtype=self.parts.plan.input_dtype,
        )


def decoded(source: Source, at_least: int) -> Source:
    """Images of the source, decoded, in memory: a few, each of them many times."""
    if source.pixels is not None:
        return source
    few = [image.permute(1, 2, 0).contiguous().numpy() for image in _some(source)]
    pixels = np.empty(max(at_least, len(few)), dtype=object)
    for i in range(len(pixels)):
        pixels[i] = few[i % len(few)]
    return Source(source.name, source.size, pixels=pixels)


def limit(found: dict[str, float]) -> str:
    """What holds a run up, in words, from the arms' samples/s."""
    step, loader, whole = found["step alone"], found["loader alone"], found["end to end"]
    slower, name = min((step, "the training step"), (loader, "the loader"))
    share = min(1.0, whole / slower)  # beyond it is noise
    if share >= LIMITING:
        other = (
            "Data loading does not slow it down" if name == "the training step" else "The training step waits for it"
        )
        return f"{name}. {other}: a run reaches {100 * share:.0f} % of the speed that it has alone"
    return (
        f"{name}, and the cores that it shares with the rest: a run reaches {100 * share:.0f} % of the speed of the "
        "slower part, so the two compete for the same cores"
    )


def fit_into_memory(source: Source) -> bool:
    """Whether the decoded images would take less than 2 GiB, by the largest of a few."""
    return len(source) * max(image.nbytes for image in _some(source)) < 2**31


def _some(source: Source) -> list[Tensor]:
    """The first readable images, (3, H, W) uint8."""
    found: list[Tensor] = []
    for i in range(len(source)):
        try:
            found.append(read(source, i))
        except RuntimeError:  # the run itself replaces it, and says so
            continue
        if len(found) == DECODED:
            break
    return found


def candidates(
    settings: PretrainConfig, ranks: Ranks, found: dict[str, float], *, small: bool
) -> dict[str, PretrainConfig]:
    """Settings that may help against the limit, flags -> config; those that change what is learnt come last.

    small: whether all images fit into memory.
    """
    cuda = ranks.device.type == "cuda"
    threads = settings.data.threads or cores.per_process(distributed.local_world_size())
    tries = dict[str, PretrainConfig]()
    starving = found["loader alone"] < found["step alone"] / LIMITING
    if small and settings.data.backend not in ("resident", "synthetic") and (starving or not cuda):
        tries["--data.backend resident"] = replace(settings, data=replace(settings.data, backend="resident"))
    if starving:
        more = min(cores.per_process(1), 2 * threads)
        if more > threads:
            tries[f"--data.threads {more}"] = replace(settings, data=replace(settings.data, threads=more))
        if settings.data.backend == "torchvision":
            tries["--data.backend auto"] = replace(settings, data=replace(settings.data, backend="auto"))
    if found["step alone"] < found["loader alone"] / LIMITING:
        if not cuda and threads > 1:
            tries["--data.threads 1"] = replace(settings, data=replace(settings.data, threads=1))
        half = cuda or fast_bf16(ranks.device)
        if half and settings.precision in ("fp32", "fp64"):
            tries["--precision bf16"] = replace(settings, precision="bf16")
        elif half and not cuda:  # small products are not worth their casts everywhere
            tries["--precision fp32"] = replace(settings, precision="fp32")
        if not compiles(settings, ranks.device) and not lacks(ranks.device)[0]:
            tries["--compile on"] = replace(settings, compile="on")
        if cuda:
            tries[f"--batch-size {2 * settings.batch_size}"] = replace(settings, batch_size=2 * settings.batch_size)
    return tries


def main(settings: PretrainConfig) -> int:
    """Measure the arms, name the limit, try what may help; returns 0."""
    ranks = distributed.init(settings.device)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())  # a terminal breaks words
    devices = settings.ranks or (torch.cuda.device_count() if ranks.device.type == "cuda" else 1)
    if devices > 1:  # one device's share: the arms need no others
        settings = replace(settings, ranks=1, batch_size=settings.batch_size // devices)
        console.print(f"one of {devices} ranks, with its share of the batch, {settings.batch_size}")
    found, source = _measure(settings, ranks, console)
    tries = candidates(settings, ranks, found, small=fit_into_memory(source))
    gains = {flags: _tried(settings, other, ranks, flags, console) for flags, other in tries.items()}
    useful = [flags for flags, gain in gains.items() if gain >= WORTH]
    if useful:
        console.print(f"[bold]take {' '.join(useful)}[/]")
    elif tries:
        console.print("[bold]keep the settings:[/] nothing that was tried is faster")
    else:
        console.print("[bold]keep the settings:[/] there is nothing left to try")
    distributed.shutdown()
    return 0


def _measure(settings: PretrainConfig, ranks: Ranks, console: Console) -> tuple[dict[str, float], Source]:
    """Print the arms and the limit; the arms' medians, and what was read."""
    here = measure.stamp()
    where = here["gpu"] or f"{here['cores']} cores of {here['cpu'].split(' (')[0]}"
    console.print(Text.assemble((shown(settings.name), "bold"), f", batch {settings.batch_size}, on {shown(where)}"))
    noise = measure.warn_of_noise(ranks.device, lambda line: console.print(f"[yellow]{line}[/]"))
    with console.status("building") if console.is_terminal else nullcontext():
        recipe = Recipe(settings, ranks)
        rate = measure.matrix_rate(ranks.device, recipe.matrix_dtype())
        operations = recipe.flops()
    console.print(f"measuring {', '.join(ARMS)}: {WINDOWS} windows of {recipe.window_s:g} s each, in turns")
    values = measure.take_turns(recipe.arms(), WINDOWS)
    spreads = {name: measure.spread(samples) for name, samples in values.items()}
    table = Table("", "samples/s", "p20 to p80", "views/s")
    for name, found in spreads.items():
        views = "" if name == "augmentation alone" else f"{found['median'] * recipe.views:,.0f}"
        table.add_row(name, f"{found['median']:,.0f}", f"{found['p20']:,.0f} to {found['p80']:,.0f}", views)
    console.print(table)
    medians = {name: float(found["median"]) for name, found in spreads.items()}
    used = operations * medians["step alone"] / settings.batch_size / rate
    console.print(
        f"waits for data {100 * recipe.data_wait(5):.0f} % of the time; the step alone runs its products at "
        f"{100 * used:.0f} % of this machine's matrix rate ({rate / 1e12:.2f} TFLOP/s, "
        f"{str(recipe.matrix_dtype()).removeprefix('torch.')}); peak memory {recipe.peak_bytes() / 2**30:.2f} GiB; "
        f"machine's noise {100 * noise:.0f} %"
    )
    console.print(f"[bold]bottleneck: {limit(medians)}[/]")
    recipe.close()
    return medians, recipe.parts.source


def gain(
    settings: PretrainConfig, other: PretrainConfig, ranks: Ranks, windows: int = TRY_WINDOWS
) -> dict[str, float | int]:
    """The spread of the samples/s of a run with other settings over that of one with these, measured in turns."""
    recipes = Recipe(settings, ranks), Recipe(other, ranks)
    arms = {str(number): recipe.arms()["end to end"] for number, recipe in enumerate(recipes)}
    values = measure.take_turns(arms, windows)
    for recipe in recipes:
        recipe.close()
    return measure.spread([b / a for a, b in zip(*values.values(), strict=True)])


def _tried(settings: PretrainConfig, other: PretrainConfig, ranks: Ranks, flags: str, console: Console) -> float:
    """The median gain of other settings, which is printed; 1 where it may be noise, 0 where they cannot run."""
    try:
        found = gain(settings, other, ranks)
    except (RuntimeError, UserError) as error:  # also of memory: OutOfMemoryError is a RuntimeError
        console.print(f"tried {flags}: cannot run ({one_line(error) or type(error).__name__})", markup=False)
        return 0.0
    is_sure = found["p20"] > 1 or found["median"] < 1
    console.print(
        f"tried {flags}: {found['median']:.2f} x the samples/s ({found['p20']:.2f} to {found['p80']:.2f})"
        + ("" if is_sure else ": within the noise of this machine")
    )
    return float(found["median"]) if is_sure else 1.0
