"""A checkpoint's encoder, the images that ``sslx probe`` and ``sslx plot`` look at, and the features of these."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslx import config, data, distributed, encoders, methods, rng
from sslx.config import PretrainConfig
from sslx.console.words import one_line, shown, wrapped
from sslx.data import sources
from sslx.data.listing import silent
from sslx.data.sources import Source
from sslx.data.views import ViewSpec
from sslx.distributed import Ranks
from sslx.encoders.group_norm import group_norm
from sslx.errors import ConfigError, DataError, MissingInput
from sslx.methods.base import Method
from sslx.probe import features, held_out
from sslx.probe.features import Features
from sslx.runs import checkpoint
from sslx.runs.state import VIEW


@dataclass(frozen=True)
class Trained:
    """A checkpoint: its config, its views' size, the probes' view, the method's weights, and its run folder."""

    settings: PretrainConfig
    size: int
    view: ViewSpec
    weights: dict[str, Any]
    step: int
    folder: Path

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The augmented views that the method was trained on."""
        settings = self.settings
        return methods.module(settings.method.name).views(settings.method, settings.augment, self.size)

    def has_seen(self, settings: data.Config) -> bool:
        """Whether the training images of these settings are those of the run."""
        theirs, ours = (
            (config.source, None if config.root is None else os.path.realpath(config.root))
            for config in (settings, self.settings.data)
        )
        return theirs == ours

    def encoder(self, *, trained: bool, device: torch.device) -> encoders.Encoder:
        """The encoder, with the checkpoint's weights or as it was initialised at the start of the run."""
        rng.seed_torch(self.settings.seed)
        norm = "group" if self.settings.batch_norm == "group" else "batch"
        trunk = replace(self.settings.encoder, weights=None)
        encoder = encoders.build(trunk, self.size, self.view.size, norm=norm)
        if trained:
            weights = {k.removeprefix("encoder."): v for k, v in self.weights.items() if k.startswith("encoder.")}
            checkpoint.load_weights(encoder, weights, f"checkpoint in {self.folder}")
        return encoder.to(device)

    def method(self, device: torch.device) -> Method:
        """The method, with the checkpoint's weights, in evaluation mode."""
        encoder = self.encoder(trained=False, device=torch.device("cpu"))
        method: Method = methods.module(self.settings.method.name).Method(self.settings.method, encoder)
        if self.settings.batch_norm == "group":
            group_norm(method)
        checkpoint.load_weights(method, self.weights, f"checkpoint in {self.folder}")
        return method.to(device).eval()


def load(path: Path) -> Trained:
    """Read a run folder, a checkpoint directory or a state.pt."""
    try:
        state = checkpoint.load(path, needs=VIEW)
    except MissingInput as error:
        raise MissingInput(f"{error}{_meant(path)}") from error
    try:
        view = ViewSpec(**state["eval_view"])
    except (TypeError, ValueError) as error:
        raise DataError(f"checkpoint {path} is not one that sslx wrote: its 'eval_view': {one_line(error)}") from error
    folder = path.parent if path.name == "state.pt" else path
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    size = state.get("size", view.size)  # of the training views: the encoder's stem depends on it
    return Trained(config.loads(state["config"]), size, view, state["method"], state["step"], folder)


def _meant(path: Path) -> str:
    """What may have been meant by a path without a checkpoint, to be added to the error; else ""."""
    if (run := Path("runs") / path.name) != path and (run / "config.json").is_file():
        return f"; did you mean {shown(run)}?"
    if path.exists() and not (path / "config.json").is_file():
        return "; the images to look at go into --data.root"
    return ""


class Bars:
    """One progress bar for the stage that reports, gone when all is done; on rank 0 and a terminal only."""

    def __init__(self, console: Console, enabled: bool) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        visible = enabled and console.is_terminal
        quiet = Console(quiet=True)  # rich 14 ends a bar with a line even where it shows none
        self.display = Progress(*columns, console=console if visible else quiet, transient=True, disable=not visible)
        self._task = self.display.add_task("", total=None)
        self._name = self.stage = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        name = f"{self.stage}: {what}"
        if name != self._name:  # its time left is its own
            self.display.reset(self._task, description=name, total=total)
            self._name = name
        self.display.update(self._task, completed=done, total=total)


@dataclass(frozen=True)
class Splits:
    """The images to look at, ``test``, and those to compare them with, ``train``; what the first are, in words.

    all_train: all training images, of which ``train`` lacks those that are held out.
    """

    train: Source
    test: Source
    name: str
    all_train: Source


def splits(trained: Trained, settings: data.Config, say: Callable[[str], None], *, least: int = 1) -> Splits:
    """Both splits, told of to ``say`` as ``sslx pretrain`` tells of its images.

    Without a test split, or one without labels where training images have them, a part of the training images stands in
    for it, as ``probe.held_out`` says, of at least ``least`` images.  Only the folder that --data.test-root names is
    taken as it is, and its UserErrors are raised.
    """
    train = sources.build(settings, "train", say=say)
    _describe(train, "training", say)
    try:
        test = sources.build(settings, "test", say=say, classes=train.classes, levels=train.levels)
        if settings.test_root is None and test.labels is None and train.labels is not None:
            raise DataError(f"the images of {test.name} have no labels ({test.unlabeled})")
    except (MissingInput, DataError) as error:
        if settings.test_root is not None:
            raise
        return _held_out(trained, settings, train, str(error), least, say)
    _describe(test, "test", say)
    return Splits(train, test, "test", train)


def _describe(source: Source, split: str, say: Callable[[str], None]) -> None:
    for line in (f"{split} split: {source.describe()}", *source.notes):
        say(line)


def _held_out(
    trained: Trained, settings: data.Config, train: Source, why: str, least: int, say: Callable[[str], None]
) -> Splits:
    """A part of the training images as the test split, and one line on it."""
    labels = None if unlearnable(train) else train.labels
    least = least if labels is not None else max(least, held_out.ENOUGH)
    rows = held_out.rows(len(train), labels, held_out.number(len(train), least))
    name = "training" if len(rows) == len(train) else "held-out training"
    which = f"{len(rows):,} of the {len(train):,} training images are held out in its place"
    if name == "training":
        which = "the only training image is taken" if len(rows) == 1 else f"all {len(rows)} training images are taken"
    seen = ""
    if trained.has_seen(settings):
        seen = ", which the encoder has seen in training"
        seen += ", without their labels" if labels is not None and not _takes_labels(trained.settings) else ""
    say(f"no test split: {which}{seen} ({why})")
    return Splits(train.subset(held_out.others(len(train), rows)), train.subset(rows), name, train)


def unlearnable(source: Source) -> str:
    """Why no probe can be trained on the labels of a source, "" where one can."""
    if source.labels is None:
        return f"{source.name} has no labels" + (f" ({source.unlabeled})" if source.unlabeled else "")
    counts = np.unique(source.labels, return_counts=True)[1]
    if len(counts) < 2:
        return f"all images of {source.name} are of one class"
    return f"each class of {source.name} has a single image" if counts.max() < 2 else ""


def _takes_labels(settings: PretrainConfig) -> bool:
    """Whether the method trains on labels."""
    try:
        settings.method.check(settings.batch_size, False)
    except ConfigError:
        return True
    return False


def say_to(console: Console, ranks: Ranks) -> Callable[[str], None]:
    """Prints a line on rank 0: wrapped between words on a terminal, else as it is."""

    def say(line: str) -> None:
        text = wrapped(line, console.width) if console.is_terminal else line
        console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    return say if ranks.is_main else silent


def loader(
    settings: data.Config, source: Source, view: ViewSpec, batch_size: int, ranks: Ranks, dtype: torch.dtype
) -> data.Loader:
    """This rank's share of a source, as probes see it."""
    return data.evaluation(
        settings,
        source,
        view,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_world_size=distributed.local_world_size(),
        device=ranks.device,
        dtype=dtype,
    )


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
