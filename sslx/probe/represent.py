"""The representations that ``sslx probe`` scores: raw pixels and encoders, with features kept on disk."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from sslx import __version__, data, distributed, encoders
from sslx.config import ProbeConfig
from sslx.console.bars import Bars
from sslx.console.words import one_line, plural, shown
from sslx.data.order import Sequential
from sslx.data.sources import Context, Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import NonFiniteError, UserError
from sslx.probe import cache, features, fine_tune, images
from sslx.probe.features import Features
from sslx.trained import Trained

PRETRAINED, AVERAGED = "pretrained encoder", "average of the encoder"
UNTRAINED, PIXELS = "untrained encoder", "raw pixels"
_PIXEL_VIEWS = 2
"""Augmented views of raw pixels, for alignment.  They have no LiDAR, for which more would be needed."""


class Representations:
    """The representations of one checkpoint.

    folder: where features are kept; None if they are not.
    augmented: the views that scores without labels augment images by, two of one size.
    All ranks must call its methods together.  Features are returned on rank 0 at least.
    """

    def __init__(
        self,
        trained: Trained,
        folder: Path | None,
        augmented: Sequence[ViewSpec],
        options: ProbeConfig,
        ranks: Ranks,
        bars: Bars,
    ) -> None:
        self.trained, self._options, self._ranks, self._bars = trained, options, ranks, bars
        self._augmented = augmented
        self._cache = cache.Cache((folder or Path()) / cache.FOLDER, options.probe.cache_gb if folder else 0)
        self._encoders = dict[str, encoders.Encoder]()
        self._digests = dict[str, str]()
        self._num_kept = self._num_computed = 0
        self._problems = dict[str, None]()  # in their order, each once

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the representations: baselines if they are enabled, and a moving average if the run kept one."""
        baselines = (PIXELS, UNTRAINED) if self._options.baselines else ()
        return (*baselines, PRETRAINED, *((AVERAGED,) if self._average else ()))

    def encoder(self, name: str) -> encoders.Encoder:
        """Return the encoder of a representation other than raw pixels."""
        if name not in self._encoders:
            trained = self._average if name == AVERAGED and self._average else self.trained
            self._encoders[name] = trained.untrained_encoder() if name == UNTRAINED else trained.encoder
        return self._encoders[name]

    def identity(self, name: str) -> str:
        """Return a digest of all that scores of a representation depend on, apart from the images and the settings."""
        return distributed.broadcast_object(
            self._key(name, "", [self.trained.view, *self._augmented]) if self._ranks.is_main else ""
        )

    def task(self, train: Source, test: Source) -> fine_tune.Task:
        """Return the images to fine-tune on and to test on, both in the size of the probes' view."""
        view, reading = self.trained.view, self._options.data
        augmented = replace(self._augmented[0], size=view.size)
        return fine_tune.Task(
            train=train, test=test, view=view, augmented=augmented, reading=reading, ranks=self._ranks
        )  # fmt: skip

    def plain(self, name: str, source: Source) -> Features | None:
        """Return the features of a source's images with the probes' view."""
        view = self.trained.view
        return self._get(
            name,
            source,
            [view],
            lambda: images.loader(
                self._options.data, source, view, self._options.batch_size, self._ranks, torch.float32
            ),
        )

    def augmented(self, name: str, source: Source) -> Features | None:
        """Return the features of several augmented views of a source's images, next to each other: (N, V * D)."""
        num_views = _PIXEL_VIEWS if name == PIXELS else self._options.probe.num_views
        specs = [self._augmented[i % 2] for i in range(num_views)]
        return self._get(name, source, specs, lambda: self._augmented_batches(source, specs))

    def report(self) -> list[str]:
        """Return lines that say how many features came from the run folder, and why some will not stay there."""
        lines = list(self._problems)
        if self._num_kept:
            folder = shown(self._cache.folder)
            total = self._num_kept + self._num_computed
            rest = f"computed {self._num_computed}" if self._num_computed else "computed none"
            lines.insert(0, f"features: took {self._num_kept} of {plural(total, 'set')} from {folder}, {rest}")
        return lines

    @cached_property
    def _average(self) -> Trained | None:
        """The checkpoint with the moving average of its encoder in its place, or None if there is none."""
        if not self.trained.is_run or self.trained.settings.average.momentum is None:
            return None
        try:
            return self.trained.averaged()
        except UserError as error:  # a checkpoint of which only the encoder was copied
            self._problems[f"without the {AVERAGED}: {one_line(error)}"] = None
            return None

    def _augmented_batches(self, source: Source, specs: Sequence[ViewSpec]) -> data.Loader:
        order = Sequential(
            num_samples=len(source),
            per_rank=max(1, 2 * self._options.batch_size // len(specs)),
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
        )
        seed = self.trained.seed
        return data.in_order(
            self._options.data, source, specs, order, seed=seed, ranks=self._ranks, dtype=torch.float32
        )

    def _get(
        self, name: str, source: Source, specs: Sequence[ViewSpec], batches: Callable[[], data.Loader]
    ) -> Features | None:
        """Return features from the run folder; else compute them, and keep them there for the next time."""
        key, kept = "", None
        if self._ranks.is_main:
            key = self._key(name, _images_digest(source, self._options.data.timeout_s), specs)
            kept = self._cache.read(key)
        if distributed.broadcast_object(kept is not None):
            self._num_kept += 1
            return kept
        self._num_computed += 1
        found = self._computed(name, batches(), len(source), len(specs))
        if self._ranks.is_main:
            what = f"{name}, step {self.trained.step}, {len(specs)} views of {len(source)} images of {source.name}"
            if problem := self._cache.write(key, found, what):
                self._problems[problem] = None
        distributed.wait_for_main()
        return found

    def _computed(self, name: str, batches: data.Loader, num_samples: int, num_views: int) -> Features:
        if name == PIXELS:
            return features.pixels(
                batches, num_samples=num_samples, num_views=num_views, side=self._side, progress=self._bars
            )
        autocast = images.autocast(self._ranks.device)
        try:
            return features.extract(
                self.encoder(name), batches,
                autocast=autocast, num_samples=num_samples, num_views=num_views, progress=self._bars,
            )  # fmt: skip
        except NonFiniteError as error:
            raise NonFiniteError(f"{name} of {shown(self.trained.folder)}: {error}") from error

    def _key(self, name: str, images: str, specs: Sequence[ViewSpec]) -> str:
        reading = self._options.data
        return cache.key(
            version=__version__,
            representation=self._digest(name),
            images=images,
            range=str(reading.range),
            is_synthetic=reading.backend == "synthetic",
            views=[str(spec) for spec in specs],
            seed=self.trained.seed if any(spec.augment for spec in specs) else None,
        )

    def _digest(self, name: str) -> str:
        """Return a digest of the representation's own part: its weights and architecture, or the size of its pixels."""
        if name == PIXELS:
            return f"pixels {self._side}"
        if name not in self._digests:
            encoder = self.encoder(name)
            facts = f"{encoder.recipe} {images.autocast(self._ranks.device)}"
            self._digests[name] = f"{cache.weights_digest(encoder)} {facts}"
        return self._digests[name]

    @property
    def _side(self) -> int:
        return min(features.PIXEL_SIDE, self.trained.size, self.trained.view.size)


def augmented_views(trained: Trained, of: Trained) -> tuple[ViewSpec, ViewSpec]:
    """Return the first two training views of one size of a run, at the size and normalization of another.

    trained: the run that gets them.  of: the run whose augmentation they have.
    Of a method with a single view, both are the same.
    """
    first = of.views[0]
    second = next((view for view in of.views[1:] if view.size == first.size), first)
    view = trained.view
    own = {"size": trained.views[0].size, "mean": view.mean, "std": view.std, "channels": view.channels}
    return replace(first, **own), replace(second, **own)


@lru_cache(maxsize=4)
def _images_digest(source: Source, timeout_s: float) -> str:
    """Return ``cache.images_digest`` of a source, computed once.  Raises StorageError if its disk does not answer."""
    what = f"the identity of the images of {source.name}"
    return Context(timeout_s=timeout_s).call(what, lambda _: cache.images_digest(source))
