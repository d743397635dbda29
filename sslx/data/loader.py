"""Loaders: read, decode and augment the images of a source into Batches, restartable at any batch and world size."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sslx.data import draws, exclusion
from sslx.data.batch import Batch
from sslx.data.config import Config
from sslx.data.draws import Draw, Draws
from sslx.data.order import VERSION, Order, Sequential, Shuffled
from sslx.data.planner import Planner
from sslx.data.quarantine import Quarantine
from sslx.data.sources import Source
from sslx.data.text import Texts, TextSpec
from sslx.data.transfer import Arrays, Delivery
from sslx.data.views import ResizedView, ViewSpec
from sslx.data.waiting import Caller, StopWaiting, WaitPolicy, report_to
from sslx.data.workers import Deadly
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, UserError
from sslx.machine import cores, device_errors, limits

Indices = npt.NDArray[np.int64]
_DRAW = "draw "
_MAX_FAILURES = 5
"""Failures of a backend at one batch, all of whose files can be read, that end the run."""


class Backend(Protocol):
    """Read the images of a source and make views of them."""

    @property
    def specs(self) -> Sequence[ViewSpec]:
        """The views made of each image."""
        ...

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batches start, start + 1, ... until the planner has no more.

        Raises RuntimeError if an image cannot be read, which ends the stream.
        """
        ...

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Return the index of each image that cannot be read and the reason.  All backends return the same."""
        ...


class Loader:
    """An iterator of Batches whose whole state is the number of batches delivered.

    Unreadable files are replaced by others, chosen as a function of the sample alone, so that step counts and all
    other samples do not change.  ``bad`` maps their indices to their names.  ``formats.read`` decides for all backends
    which files are unreadable: those that are missing, empty, truncated, not images, or in an unsupported format.

    draw: turns the random numbers of a batch, a function of ``seed``, into its ``draws``.  It is called in the
    loader's process, never in a worker's.
    text: the text that each sample needs.  Raises ConfigError if the source has none.
    excluded: (K,) indices of images that are replaced like unreadable ones, but not counted among them.
    """

    def __init__(
        self,
        order: Order,
        backend: Backend,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int,
        draw: Draw = draws.nothing,
        text: TextSpec | None = None,
        max_bad: float = 0.01,
        excluded: Indices | None = None,
        say: Callable[[str], None] = lambda _: None,
        wait_policy: WaitPolicy | None = None,
    ) -> None:
        self.order, self.backend, self.source, self.seed, self._draw = order, backend, source, seed, draw
        self.device, self.dtype, self._wait_policy = device, dtype, wait_policy or WaitPolicy()
        self._texts = Texts(text, source.facts.captions, source.name, seed) if text else None
        self.delivered = 0
        self.say = say
        none = np.empty(0, dtype=np.int64)
        excluded = none if excluded is None else excluded
        self._quarantine = Quarantine(source, backend, max_bad, lambda line: self.say(line), excluded)
        policy = self._wait_policy  # and not the loader, which would be kept in memory
        report_to(lambda line: policy.say(line))
        self._stream: Iterator[Delivery] | None = None
        self._planner = Planner(
            order=order, specs=backend.specs, seed=seed, substitute=self._quarantine.substitute, along=self.along
        )

    @property
    def bad(self) -> dict[int, str]:
        """The names of the unreadable images found so far, by index."""
        return self._quarantine.bad

    @property
    def batches_per_epoch(self) -> int:
        return self.order.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.order.finished(self.delivered):
            self.close()
            raise StopIteration
        delivery = self._delivery()
        extras = delivery.along
        self._quarantine.known_good = delivery.index[-1:]
        self.delivered += 1
        method_draws = tuple(array for name, array in extras.items() if name.startswith(_DRAW))
        index = torch.from_numpy(delivery.index)
        batch = Batch(delivery.views, extras.get("label"), index, method_draws, extras.get("text"))
        return batch.to(self.device, self.dtype)  # copies only where dtype or device differ

    def along(self, t: int) -> Arrays:
        """Return batch t's labels, texts and draws, which the backend sends along with the inputs of its views."""
        index, passes, arrays = self.order.batch(t), self.order.passes(t), Arrays()
        if self.source.facts.labels is not None:
            arrays["label"] = self.source.facts.labels[self._quarantine.substitute(index)]
        if self._texts:
            arrays["text"] = self._texts.tokens(passes, index, self._quarantine.substitute(index))
        method_draws = self._draw(Draws(seed=self.seed, epoch=passes, batch=t, index=index))
        return arrays | {f"{_DRAW}{number}": array for number, array in enumerate(method_draws)}

    def _delivery(self) -> Delivery:
        """Return the next batch, from a new stream if the last one ended at unreadable images."""
        num_failures = 0
        while True:
            if self._stream is None:
                self._stream = self.backend.stream(self._planner, self.delivered)
            try:
                return next(self._stream)
            except (StopWaiting, UserError):
                self.close()
                raise
            except Deadly as error:
                self.close()
                self._quarantine.set_aside({error.index: str(error)})
            except (RuntimeError, MemoryError) as error:
                self.close()
                if fault := device_errors.find(error):  # not the fault of a file, so replacing files would not help
                    raise fault from None if fault is error else error
                if words := limits.explain(error):
                    raise ConfigError(f"the loader: {words}") from error
                if self._quarantine.search(self.order.batch(self.delivered)):
                    continue
                num_failures += 1  # the search may have changed how the backend reads some files
                if num_failures == _MAX_FAILURES:
                    reason = " ".join(str(error).split())
                    raise DataError(f"the loader failed on readable files: {reason}") from error
                if num_failures > 1:  # perhaps the storage fails now and then, at another file each time
                    time.sleep(0.05 * 2**num_failures)

    def listen(self, stop: Callable[[float], bool], say: Callable[[str], None]) -> None:
        """Send messages to ``say``, and raise StopWaiting in a wait for data once ``stop(seconds waited)`` is true."""
        self.say = self._wait_policy.say = say
        self._wait_policy.stop = stop

    def back_to(self, delivered: int) -> None:
        """Continue after this number of delivered batches.  Later batches were not used and come again."""
        self.close()
        self.delivered = delivered

    def close(self) -> None:
        """Stop the backend's threads.  The next batch restarts them at the same place."""
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its samples delivered on all ranks together, and the images' identity."""
        return {**self.order.state(self.delivered), "num_samples": len(self.source), "images": self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        wait_policy = WaitPolicy(self._wait_policy.limit_s, say=self.say)
        with Caller(wait_policy, lambda: f"the identity of the images of {self.source.name}") as call:
            return call(self.source.identity)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the samples that ``state`` counts, at this loader's world size and batch size.

        Raises DataError, with the difference, if the source does not hold the same images.
        """
        before, now = state["num_samples"], len(self.source)
        difference = ""
        if "images" in state:
            difference = self.source.difference(state["images"], self._identity)
        elif before == now:
            self.say("an older version wrote the checkpoint without its images' identity: cannot compare the images")
        if difference or before != now:
            counts = f"{before:,} images, the source now has {now:,}" if before != now else "other images"
            raise DataError(
                f"the checkpoint was trained on {counts}{f' ({difference})' if difference else ''}: "
                "restore the images, or start a new run with --encoder.weights"
            )
        self.back_to(self.order.seek(state))
        if state.get("order", 1) != VERSION and state.get("position"):
            self.say(
                "the checkpoint is of another version of sslx, which shuffled the images in another way: until the end "
                "of this epoch some images come twice and some not at all"
            )


def has_dali() -> bool:
    """Return whether DALI is installed.  ``find_spec("nvidia.dali")`` alone raises if ``nvidia`` is missing."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _backend(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    per_rank: int,
    ranks: Ranks,
    *,
    seed: int,
    say: Callable[[str], None],
    wait_policy: WaitPolicy,
) -> Backend:
    """Return the backend that the config names.

    Raises ConfigError for images that no backend can read, and if DALI is needed but not installed.
    """
    device, name = ranks.device, config.backend
    _check_channels(source, specs)
    is_resized = any(isinstance(spec, ResizedView) for spec in specs)
    is_plain = source.facts.channels.is_plain
    if name == "auto":
        name = "dali" if has_dali() and is_plain and not is_resized else "torchvision"
    if name == "dali" and not is_plain:
        raise ConfigError(
            f"--data.backend dali reads RGB of 8 bits, and {source.name} has {source.facts.channels.in_words}: take "
            "--data.backend torchvision or resident"
        )
    if is_resized and name in ("dali", "resident"):
        raise ConfigError(
            f"--data.backend {name} does not prepare images as the library of these weights does: take "
            "--data.backend torchvision"
        )
    if name == "synthetic":
        from sslx.data.backends.synthetic import Synthetic

        return Synthetic(specs, seed=seed, max_per_rank=per_rank, device=device)
    threads = config.threads if config.threads is not None else cores.per_process(ranks.local_world_size)
    if name == "resident":
        from sslx.data.backends.resident import Resident

        return Resident(source, specs, device=device, num_threads=threads, say=say, wait_policy=wait_policy)
    if name == "torchvision":
        from sslx.data.backends.torchvision import TorchVision

        return TorchVision(
            source, specs, device=device, num_threads=threads, wait_policy=wait_policy, prefetch=config.prefetch
        )
    if not has_dali():
        raise ConfigError(
            "DALI is not installed: pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for a CUDA 12 driver), "
            "or take --data.backend torchvision"
        )
    from sslx.data.backends.dali import Dali

    threads = max(1, threads)
    return Dali(
        source, specs, max_per_rank=per_rank, device=device, num_threads=threads, wait_policy=wait_policy,
        prefetch=config.prefetch,
    )  # fmt: skip


def _check_channels(source: Source, specs: Sequence[ViewSpec]) -> None:
    """Raise ConfigError if the views are for images of other channels than the source's."""
    own = source.facts.channels
    for spec in specs:
        if isinstance(spec, ResizedView) and spec.interpolation == "lanczos" and not own.is_plain:
            raise ConfigError(
                f"these weights take images that are resized by PIL's lanczos filter, which takes RGB of 8 bits, and "
                f"{source.name} has {own.in_words}: use other weights"
            )
        if (spec.channels.num, spec.channels.is_rgb) != (own.num, own.is_rgb):
            number = "" if own.num == spec.channels.num else f" (--data.channels {spec.channels.num}, if they can be)"
            raise ConfigError(
                f"expected images with {spec.channels.in_words}, for which the views and the encoder are, but "
                f"{source.name} has {own.in_words}: take such images{number}"
            )


def training(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    accumulate: int = 1,
    seed: int,
    draw: Draw = draws.nothing,
    text: TextSpec | None = None,
    ranks: Ranks,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """Return one rank's endless training loader.  batch_size is global; views are in the order of ``specs``.

    draw: the ``Method.draw`` of the trained method.  text: the text that it needs of each sample.
    """
    order = Shuffled(
        num_samples=len(source),
        batch_size=batch_size,
        accumulate=accumulate,
        seed=seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        blocks=source.facts.blocks,
        shares=source.facts.shares,
    )
    excluded = None
    if config.exclude:
        excluded, line = exclusion.excluded(config.exclude, source)
        say(line)
    return in_order(
        config, source, specs, order,
        seed=seed, draw=draw, text=text, excluded=excluded, ranks=ranks, dtype=dtype, say=say,
    )  # fmt: skip


def evaluation(
    config: Config,
    source: Source,
    spec: ViewSpec,
    *,
    batch_size: int,
    ranks: Ranks,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """Return a loader for one pass over a source with the evaluation view.  batch_size is per rank."""
    assert spec.augment is None
    order = Sequential(num_samples=len(source), per_rank=batch_size, rank=ranks.rank, world_size=ranks.world_size)
    return in_order(config, source, [spec], order, seed=0, ranks=ranks, dtype=dtype, say=say)


def in_order(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    order: Order,
    *,
    seed: int,
    draw: Draw = draws.nothing,
    text: TextSpec | None = None,
    excluded: Indices | None = None,
    ranks: Ranks,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """Return a loader of the samples of an order.  The same seed, epoch and sample give the same views as training."""
    wait_policy = WaitPolicy(config.timeout_s, say=say)
    backend = _backend(config, source, specs, order.per_rank, ranks, seed=seed, say=say, wait_policy=wait_policy)
    return Loader(
        order,
        backend,
        source,
        ranks.device,
        dtype,
        seed=seed,
        draw=draw,
        text=text,
        max_bad=config.max_bad,
        excluded=excluded,
        say=say,
        wait_policy=wait_policy,
    )
