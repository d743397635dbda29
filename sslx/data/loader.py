"""Loaders: source -> decode and augment on the device -> Batch, restartable at any batch, at any world size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sslx import rng
from sslx.data import identity
from sslx.data.batch import Batch
from sslx.data.config import Config
from sslx.data.order import VERSION, Order, Sequential, Shuffled
from sslx.data.patience import Caller, Patience, StopWaiting
from sslx.data.quarantine import Quarantine
from sslx.data.sources import Source
from sslx.data.transfer import Along, Arrays, Made
from sslx.data.views import ViewSpec
from sslx.data.workers import Deadly
from sslx.errors import ConfigError, DataError, UserError
from sslx.machine import cores, device_errors, limits

Indices = npt.NDArray[np.int64]


class Backend(Protocol):
    """What makes views: see ``dali.Dali.stream``."""

    def stream(
        self, order: Order, start: int, substitute: Callable[[Indices], Indices], along: Along
    ) -> Iterator[Made]: ...

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why: the same on every backend."""
        ...


class Loader:
    """An iterator of Batches whose whole state is the number of batches delivered.

    Unreadable files are replaced by others, chosen as a function of the sample alone, so that step counts and
    all other samples stay as they were; ``bad`` holds them, index -> path.  Which they are is up to ``formats.read``,
    whatever the backend: what is missing, empty, cut, no image, or of a format that it refuses.

    num_draws: random numbers for each sample that a batch brings to the method, drawn with ``seed``.
    """

    num_draws = 0

    def __init__(
        self,
        order: Order,
        backend: Backend,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        *,
        seed: int,
        max_bad: float = 0.01,
        say: Callable[[str], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self.order, self.backend, self.source, self.seed = order, backend, source, seed
        self.device, self.dtype, self._patience = device, dtype, patience or Patience()
        self.delivered = 0
        self.say = say
        self._quarantine = Quarantine(source, backend, max_bad, lambda line: self.say(line))
        self._stream: Iterator[Made] | None = None

    @property
    def bad(self) -> dict[int, str]:
        """The unreadable images met so far: index -> path."""
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
        index = self.order.batch(self.delivered)
        views, came = self._made(index)
        self._quarantine.known_good = index[-1:]
        self.delivered += 1
        batch = Batch(views, came.get("label"), torch.from_numpy(index), came.get("draws"))
        return batch.to(self.device, self.dtype)  # copies only where dtype or device differ

    def along(self, t: int) -> Arrays:
        """Batch t's labels and draws, for the backend to send with what its views need."""
        index, arrays = self.order.batch(t), Arrays()
        if self.source.labels is not None:
            arrays["label"] = self.source.labels[self._quarantine.substitute(index)]
        if self.num_draws:
            drawn = rng.uniform(self.seed, "method", self.order.epoch(t), index, num=self.num_draws)
            arrays["draws"] = np.minimum(drawn.astype(np.float32), np.float32(1 - 2.0**-24))  # the largest round to 1
        return arrays

    def _made(self, index: Indices) -> Made:
        failed = False
        while True:
            if self._stream is None:
                self._stream = self.backend.stream(self.order, self.delivered, self._quarantine.substitute, self.along)
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
                if fault := device_errors.find(error):  # no file's fault, and no other file would do better
                    raise fault from None if fault is error else error
                if words := limits.explain(error):
                    raise ConfigError(f"the loader: {words}") from error
                if self._quarantine.search(index):
                    continue
                if failed:  # again, although the backend has looked at its files and may now read some otherwise
                    reason = " ".join(str(error).split())
                    raise DataError(f"the loader failed on readable files: {reason}") from error
                failed = True

    def listen(self, stop: Callable[[float], bool], say: Callable[[str], None]) -> None:
        """Tell ``say``, and end a wait for data by StopWaiting where ``stop(seconds waited)`` is true."""
        self.say = self._patience.say = say
        self._patience.stop = stop

    def back_to(self, delivered: int) -> None:
        """Go on after so many batches: what came since then was not used."""
        self.close()
        self.delivered = delivered

    def close(self) -> None:
        """Stop the backend's threads; the next batch starts them again where they were."""
        self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """Where training is: epoch, samples of it already delivered on all ranks together, and of which images."""
        return {**self.order.state(self.delivered), "num_samples": len(self.source), "images": self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        patience = Patience(self._patience.limit_s, say=self.say)
        with Caller(patience, lambda: f"the identity of the images of {self.source.name}") as call:
            return call(lambda: identity.of(self.source))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the samples that ``state`` counts, at this loader's world size and batch size.

        DataError, with the difference, where the source holds other images than those.
        """
        before, now = state["num_samples"], len(self.source)
        difference = ""
        if "images" in state:
            difference = identity.difference(state["images"], self.source, self._identity)
        elif before == now:
            self.say("the checkpoint is of a version that did not note which images it was trained on: not compared")
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
    """Whether DALI is installed; of ``nvidia.dali`` alone find_spec raises where there is no ``nvidia``."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def _threads(config: Config, local_world_size: int) -> int:
    return config.threads if config.threads is not None else cores.per_process(local_world_size)


def _backend(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    per_rank: int,
    local_world_size: int,
    device: torch.device,
    say: Callable[[str], None],
    patience: Patience,
) -> Backend:
    name = config.backend
    if name == "auto":
        name = "dali" if has_dali() else "torchvision"
    if name == "synthetic":
        from sslx.data.backends.synthetic import Synthetic

        return Synthetic(specs, seed=seed, max_per_rank=per_rank, device=device)
    threads = _threads(config, local_world_size)
    if name == "resident":
        from sslx.data.backends.resident import Resident

        return Resident(source, specs, seed=seed, device=device, num_threads=threads, say=say, patience=patience)
    if name == "torchvision":
        from sslx.data.backends.torchvision import TorchVision

        return TorchVision(source, specs, seed=seed, device=device, num_threads=threads, patience=patience)
    if not has_dali():
        raise ConfigError(
            "DALI is not installed: pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for a CUDA 12 driver), "
            "or take --data.backend torchvision"
        )
    from sslx.data.backends.dali import Dali

    threads = max(1, threads)
    return Dali(source, specs, seed=seed, max_per_rank=per_rank, device=device, num_threads=threads, patience=patience)


def training(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    accumulate: int = 1,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 1,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """The endless training loader of one rank; batch_size is global, views come in the order of ``specs``."""
    order = Shuffled(
        num_samples=len(source),
        batch_size=batch_size,
        accumulate=accumulate,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    patience = Patience(config.timeout_s, say=say)
    backend = _backend(
        config,
        source,
        specs,
        seed=seed,
        per_rank=order.per_rank,
        local_world_size=local_world_size,
        device=device,
        say=say,
        patience=patience,
    )
    return Loader(order, backend, source, device, dtype, seed=seed, max_bad=config.max_bad, say=say, patience=patience)


def evaluation(
    config: Config,
    source: Source,
    spec: ViewSpec,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 1,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """One pass over a source through the evaluation view, every image once; batch_size is per rank."""
    assert spec.augment is None
    order = Sequential(num_samples=len(source), per_rank=batch_size, rank=rank, world_size=world_size)
    return in_order(
        config, source, [spec], order, seed=0, local_world_size=local_world_size, device=device, dtype=dtype, say=say
    )


def in_order(
    config: Config,
    source: Source,
    specs: Sequence[ViewSpec],
    order: Order,
    *,
    seed: int,
    local_world_size: int = 1,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda _: None,
) -> Loader:
    """Views of the samples of an order, made as in training: of the same seed, epoch and sample they are the same."""
    patience = Patience(config.timeout_s, say=say)
    backend = _backend(
        config,
        source,
        specs,
        seed=seed,
        per_rank=order.per_rank,
        local_world_size=local_world_size,
        device=device,
        say=say,
        patience=patience,
    )
    return Loader(order, backend, source, device, dtype, seed=seed, max_bad=config.max_bad, say=say, patience=patience)
