"""The images that ``sslx probe`` and ``sslx plot`` look at: two splits of them, and their features."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sslx import data, encoders
from sslx.config import PlotConfig, PretrainConfig, ProbeConfig
from sslx.console.bars import Bars
from sslx.data import sources
from sslx.data.facts import Facts
from sslx.data.sources import Source, SourceConfig
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.probe import features, held_out
from sslx.probe.features import Features
from sslx.trained import Trained


@dataclass(frozen=True)
class Splits:
    """The images to look at, ``test``, and those to compare them with, ``train``; what the first are, in words.

    all_train: all training images, of which ``train`` lacks those that are held out.
    """

    train: Source
    test: Source
    name: str
    all_train: Source


def splits(
    trained: Trained, options: ProbeConfig | PlotConfig, say: Callable[[str], None], *, least: int = 1
) -> Splits:
    """Both splits, told of to ``say`` as ``sslx pretrain`` tells of its images.

    Without a test split, or one without labels where training images have them, a part of the training images stands in
    for it, as ``probe.held_out`` says, of at least ``least`` images.  Only the folder that --source.test-root names is
    taken as it is, and its UserErrors are raised.
    """
    test_root: Path | None = getattr(options.source, "test_root", None)  # of a source that has such
    train = sources.build(options.source, "train", options.data, say=say)
    _describe(train, "training", say)
    try:
        test = sources.build(options.source, "test", options.data, say=say, training=train)
        if test_root is None and test.facts.labels is None and train.facts.labels is not None:
            raise DataError(f"the images of {test.name} have no labels ({test.unlabeled})")
    except (MissingInput, DataError) as error:
        if test_root is not None:
            raise
        return _held_out(trained, options.source, train, str(error), least, say)
    _describe(test, "test", say)
    return Splits(train, test, "test", train)


def _describe(source: Source, split: str, say: Callable[[str], None]) -> None:
    for line in (f"{split} split: {source.describe()}", *source.notes):
        say(line)


def _held_out(
    trained: Trained, images: SourceConfig, train: Source, why: str, least: int, say: Callable[[str], None]
) -> Splits:
    """A part of the training images as the test split, and one line on it."""
    labels = None if unlearnable(train) else train.facts.labels
    least = least if labels is not None else max(least, held_out.ENOUGH)
    rows = held_out.rows(len(train), labels, held_out.number(len(train), least))
    name = "training" if len(rows) == len(train) else "held-out training"
    which = f"{len(rows):,} of the {len(train):,} training images are held out in its place"
    if name == "training":
        which = "the only training image is taken" if len(rows) == 1 else f"all {len(rows)} training images are taken"
    seen = ""
    if has_seen(trained, images):
        seen = ", which the encoder has seen in training"
        seen += ", without their labels" if labels is not None and not _takes_labels(trained.settings) else ""
    say(f"no test split: {which}{seen} ({why})")
    return Splits(train.take(held_out.others(len(train), rows)), train.take(rows), name, train)


def has_seen(trained: Trained, source: SourceConfig) -> bool:
    """Whether the training images of this source are those of the run."""
    return source.place == trained.settings.source.place


def unlearnable(source: Source) -> str:
    """Why no probe can be trained on the labels of a source, "" where one can."""
    if source.facts.labels is None:
        return f"{source.name} has no labels" + (f" ({source.unlabeled})" if source.unlabeled else "")
    counts = np.unique(source.facts.labels, return_counts=True)[1]
    if len(counts) < 2:
        return f"all images of {source.name} are of one class"
    return f"each class of {source.name} has a single image" if counts.max() < 2 else ""


def _takes_labels(settings: PretrainConfig) -> bool:
    """Whether the method trains on labels."""
    try:
        settings.method.check(settings.batch_size, Facts(num_samples=settings.batch_size, size=1))
    except ConfigError:
        return True
    return False


def loader(
    settings: data.Config, source: Source, view: ViewSpec, batch_size: int, ranks: Ranks, dtype: torch.dtype
) -> data.Loader:
    """This rank's share of a source, as probes see it."""
    return data.evaluation(settings, source, view, batch_size=batch_size, ranks=ranks, dtype=dtype)


def extract(
    trained: Trained, encoder: encoders.Encoder, settings: data.Config, source: Source, ranks: Ranks, bars: Bars
) -> Features:
    """The features of a source as probes see it."""
    batches = loader(settings, source, trained.view, 256, ranks, torch.float32)
    return features.extract(encoder, batches, autocast=autocast(ranks.device), num_samples=len(source), progress=bars)


def autocast(device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to where features are computed; None: float32 throughout."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else None
