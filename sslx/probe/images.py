"""The images that ``sslx probe`` and ``sslx plot`` evaluate: a training and a test split, and their features."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslx import data, encoders
from sslx.config import PlotConfig, PretrainConfig, ProbeConfig
from sslx.console.bars import Bars
from sslx.data import exclusion, sources
from sslx.data.facts import Facts
from sslx.data.sources import Source, SourceConfig
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.machine import devices
from sslx.probe import features, held_out
from sslx.probe.features import Features
from sslx.trained import Trained


@dataclass(frozen=True)
class Splits:
    """The images to evaluate (``test``) and the images to compare them with (``train``).

    name: of the test split, in words.
    all_train: all training images; ``train`` lacks those that are held out.
    """

    train: Source
    test: Source
    name: str
    all_train: Source


def splits(
    trained: Trained, options: ProbeConfig | PlotConfig, say: Callable[[str], None], *, min_images: int = 1
) -> Splits:
    """Return both splits, and describe them to ``say`` as ``sslx pretrain`` does.

    If there is no test split, or if it lacks labels that the training images have, at least ``min_images`` training
    images stand in for it (see ``probe.held_out``).  A folder named by --source.test-root is always used, and its
    UserErrors are raised.
    """
    test_root: Path | None = getattr(options.source, "test_root", None)  # of a source that has such
    train = sources.build(options.source, "train", options.data, say=say)
    if options.data.exclude and was_trained_on(trained, options.source):
        left_out, line = exclusion.excluded(options.data.exclude, train)
        say(line)
        train = train.take(np.setdiff1d(np.arange(len(train)), left_out))
    _describe(train, "training", say)
    try:
        test = sources.build(options.source, "test", options.data, say=say, training=train)
        if test_root is None and test.facts.labels is None and train.facts.labels is not None:
            raise DataError(f"the images of {test.name} have no labels ({test.unlabeled})")
    except (MissingInput, DataError) as error:
        if test_root is not None:
            raise
        return _held_out(trained, options.source, train, str(error), min_images, say)
    _describe(test, "test", say)
    return Splits(train, test, "test", train)


def _describe(source: Source, split: str, say: Callable[[str], None]) -> None:
    for line in (f"{split} split: {source.describe()}", *source.notes):
        say(line)


def _held_out(
    trained: Trained, probed: SourceConfig, train: Source, reason: str, min_images: int, say: Callable[[str], None]
) -> Splits:
    """Return splits whose test split is a part of the training images, and describe it in one line."""
    labels = None if unlearnable_reason(train) else train.facts.labels
    if labels is None:
        min_images = max(min_images, held_out.MIN_IMAGES_TO_SHOW)
    rows = held_out.rows(len(train), labels, held_out.num_held_out(len(train), min_images))
    name = "held-out training"
    line = f"no test split: {len(rows):,} of the {len(train):,} training images are held out in its place"
    if len(rows) == len(train):
        name = "training"
        used = "the only training image is" if len(rows) == 1 else f"all {len(rows)} training images are"
        line = f"no test split: {used} used in its place"
    if was_trained_on(trained, probed):
        line += ", which the encoder has seen in training"
        if labels is not None and not _uses_labels(trained.settings):
            line += ", without their labels"
    say(f"{line} ({reason})")
    return Splits(train.take(held_out.remaining_rows(len(train), rows)), train.take(rows), name, train)


def was_trained_on(trained: Trained, source: SourceConfig) -> bool:
    """Return whether the training images of this source are those that the encoder was trained on."""
    return trained.is_run and source.place == trained.settings.source.place


def unlearnable_reason(source: Source) -> str:
    """Return why no probe can be trained on the labels of a source, or an empty string if one can."""
    if source.facts.labels is None:
        return f"{source.name} has no labels" + (f" ({source.unlabeled})" if source.unlabeled else "")
    counts = np.unique(source.facts.labels, return_counts=True)[1]
    if len(counts) < 2:
        return f"all images of {source.name} have the same class"
    return f"each class of {source.name} has a single image" if counts.max() < 2 else ""


def _uses_labels(settings: PretrainConfig) -> bool:
    """Return whether the method trains on labels."""
    try:
        settings.method.check(settings.batch_size, Facts(num_samples=settings.batch_size, size=1))
    except ConfigError:
        return True
    return False


def loader(
    settings: data.Config, source: Source, view: ViewSpec, batch_size: int, ranks: Ranks, dtype: torch.dtype
) -> data.Loader:
    """Return a loader of this rank's share of a source, with the view that probes use."""
    return data.evaluation(settings, source, view, batch_size=batch_size, ranks=ranks, dtype=dtype)


def extract(
    trained: Trained, encoder: encoders.Encoder, settings: data.Config, source: Source, ranks: Ranks, bars: Bars
) -> Features:
    """Return the features of a source, with the view that probes use."""
    batches = loader(settings, source, trained.view, 256, ranks, torch.float32)
    return features.extract(encoder, batches, autocast=autocast(ranks.device), num_samples=len(source), progress=bars)


def autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype to autocast to when features are computed, or None for float32 throughout."""
    return devices.autocast(device)
