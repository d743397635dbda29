"""Sources: what to read.  A Source is a list of images, encoded files or decoded pixels, with labels if any."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.console import activity
from sslx.console.words import shown
from sslx.data.codecs import levels as black_and_white
from sslx.data.codecs.formats import Levels
from sslx.data.config import SourceConfig as Config
from sslx.data.patience import Caller, Patience
from sslx.data.sources.listing import has_images, silent
from sslx.errors import ConfigError, MissingInput
from sslx.machine.files import expanded

Split = Literal["pretrain", "train", "test"]
_TORCHVISION = {"cifar10": 32, "cifar100": 32, "fashion_mnist": 32, "stl10": 96}  # name -> default view size
_CLASSES_TOLD = 5


@dataclass(frozen=True, eq=False)
class Source:
    """Images by index: either ``paths`` of encoded files or ``pixels``, never both.

    pixels: (N, H, W, 3) uint8, or, where sizes differ, an array of N such arrays without the first dimension.
    labels: (N,) int64 or None.  classes: their names.  size: side of the views that suit it, in pixels.
    root: what all paths begin with.  unlabeled: why there are no labels.  notes: what a user should know, a line each.
    levels: black and white of files that do not state them; None: measured when the first image is read.
    """

    name: str
    size: int
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    paths: Sequence[str] | None = field(default=None, repr=False)
    pixels: npt.NDArray[Any] | None = field(default=None, repr=False)
    root: str = ""
    unlabeled: str = ""
    notes: tuple[str, ...] = ()
    levels: Levels | None = field(default=None, repr=False)

    def __len__(self) -> int:
        images = self.paths if self.paths is not None else self.pixels
        assert images is not None
        return len(images)

    def subset(self, index: npt.NDArray[np.int64]) -> "Source":
        """The images at these places, as a source of their own."""
        return replace(
            self,
            labels=None if self.labels is None else self.labels[index],
            paths=None if self.paths is None else [self.paths[i] for i in index],
            pixels=None if self.pixels is None else self.pixels[index],
        )

    def where(self, index: int) -> str:
        """How a message names the image at this place: its path, or its number."""
        return shown(self.paths[index]) if self.paths is not None else f"image {index} of {self.name}"

    def describe(self) -> str:
        """One line for the user: what was found."""
        kinds = "unlabeled" + (f": {self.unlabeled}" if self.unlabeled else "")
        if self.classes:
            names = ", ".join(self.classes[:_CLASSES_TOLD]) + ", ..." * (len(self.classes) > _CLASSES_TOLD)
            kinds = f"{_plural(len(self.classes), 'class', 'classes')} ({names})"
        return f"{self.name}: {_plural(len(self), 'image', 'images')}, {kinds}"


def build(
    config: Config,
    split: Split,
    *,
    say: Callable[[str], None] = silent,
    classes: Sequence[str] | None = None,
    levels: Levels | None = None,
) -> Source:
    """The images of a split: ``pretrain`` (with unlabelled ones where there are any), ``train`` or ``test``.

    classes: the training split's, so that a folder's test split gets the same numbers; its images of other classes
    are left out.  levels: the training split's too, so that both are scaled alike.  say: gets a line now and then
    while files are listed, and what was found of the images' range.  Raises MissingInput, DataError or
    ConfigError, each in one line that names the folder and the flag, and StorageError for a disk that does not answer.
    """
    _check_read(config)
    patience = Patience(config.timeout_s, say=say)
    source = _found(config, split, say, classes, patience)
    if source.paths is None:
        return source
    if config.range != "auto":
        levels = Levels(chosen=config.range)
    if levels is None:
        measure = partial(black_and_white.measure, source.paths, say)
        with (
            activity.doing("measuring the range of the images"),
            Caller(patience, lambda: f"the first look at the images of {source.name}") as call,
        ):
            levels = call(measure)
    return replace(source, levels=levels)


def pretrains_on_more(config: Config) -> bool:
    """Whether the images of ``pretrain`` are others than those of ``train``: unlabeled ones come on top."""
    return config.source == "stl10"


def _found(
    config: Config, split: Split, say: Callable[[str], None], classes: Sequence[str] | None, patience: Patience
) -> Source:
    if config.source == "digits":
        return _digits(split)
    if config.source == "synthetic":
        return _synthetic(config.num_synthetic, split)
    if config.source == "folder":
        from sslx.data.sources import folder

        with (
            activity.doing("listing the images"),
            Caller(patience, lambda: f"the list of the images below {shown(config.root or '')}") as call,
        ):
            return call(partial(folder.read, config, split, call.alive(say), classes))
    with activity.doing(f"{'downloading' if config.download else 'reading'} {config.source}"):
        return _torchvision(config, split)


def _check_read(config: Config) -> None:
    """ConfigError for a folder of images that the source would not look at."""
    root = config.root if config.source in ("digits", "synthetic") else None
    test_root = config.test_root if config.source != "folder" else None
    for flag, folder in (("--data.root", root), ("--data.test-root", test_root)):
        if folder is not None:
            raise ConfigError(
                f"{flag} {shown(folder)} is not read by --data.source {config.source}: take --data.source folder for "
                "your own images"
            )


def _digits(split: Split) -> Source:
    """scikit-learn's 1,797 real 8x8 digits (UCI optdigits), every fifth one of each class held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rank_in_class = np.zeros(len(labels), dtype=np.int64)
    for digit in range(10):
        mine = labels == digit
        rank_in_class[mine] = np.arange(mine.sum())
    chosen = (rank_in_class % 5 == 4) == (split == "test")
    gray = np.rint(images[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    names = tuple(str(digit) for digit in range(10))
    return Source("digits", 32, labels[chosen].astype(np.int64), names, pixels=pixels)


def _synthetic(count: int, split: Split) -> Source:
    """Ten classes of 64x64 gratings, told apart by orientation and colour, under noise.  For tests, not science."""
    if count < 1:
        raise ConfigError(f"--data.num-synthetic must be at least 1, not {count}")
    labels = np.arange(count, dtype=np.int64) % 10
    u = rng.uniform(0, f"synthetic {split}", np.arange(count), num=2)
    y, x = np.mgrid[0:64, 0:64] / 64
    angle = (labels * np.pi / 10)[:, None, None]
    wave = np.sin(2 * np.pi * (3 + 3 * u[:, :1, None]) * (x * np.cos(angle) + y * np.sin(angle)) + 6.3 * u[:, 1:, None])
    tint = 0.5 + 0.5 * np.cos(2 * np.pi * (labels[:, None] / 10 + np.arange(3) / 3))
    noise = rng.words(0, f"synthetic noise {split}", np.arange(min(count, 64)), num=64 * 64 * 3) % 64
    pixels = np.empty((count, 64, 64, 3), dtype=np.uint8)
    for i in range(count):  # one at a time: the float intermediates of all would need gigabytes
        pixels[i] = (96 + 64 * wave[i])[..., None] * tint[i] + noise[i % 64].reshape(64, 64, 3)
    return Source("synthetic", 64, labels, tuple(str(i) for i in range(10)), pixels=pixels)


def _torchvision(config: Config, split: Split) -> Source:
    """A torchvision data set in torchvision's own layout under ``root``."""
    from torchvision import datasets

    name = config.source
    root = expanded(config.root or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "sslx"))
    train = split != "test"
    parts = {"pretrain": "train+unlabeled", "train": "train", "test": "test"}
    make: dict[str, Callable[[], Any]] = {
        "cifar10": lambda: datasets.CIFAR10(root, train=train, download=config.download),
        "cifar100": lambda: datasets.CIFAR100(root, train=train, download=config.download),
        "fashion_mnist": lambda: datasets.FashionMNIST(root, train=train, download=config.download),
        "stl10": lambda: datasets.STL10(str(root), split=parts[split], download=config.download),
    }
    try:
        found = make[name]()
    except (RuntimeError, OSError) as error:
        if config.download:
            raise MissingInput(f"{name} could not be downloaded to {shown(root)}: {_first_line(error)}") from error
        own = ", or --data.source folder to read the images that lie there" if has_images(root) else ""
        raise MissingInput(
            f"{name} not found under {shown(root)}: give its folder with --data.root, or --data.download to fetch "
            f"it{own}"
        ) from error
    pixels = np.asarray(found.data)
    if name == "stl10":
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    if pixels.ndim == 3:
        pixels = np.repeat(pixels[..., None], 3, axis=-1)
    labels = np.asarray(found.labels if name == "stl10" else found.targets, dtype=np.int64)
    known = None if (labels < 0).any() else labels
    return Source(name, _TORCHVISION[name], known, None if known is None else tuple(found.classes), pixels=pixels)


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
