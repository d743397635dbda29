"""Sources: what to read.  A Source has facts about its images, and one of three ways to them.

``Pixels`` has them decoded in memory, ``Files`` has paths that a backend reads itself, ``Encoded`` reads the bytes of
an image file by its place, wherever they lie.  Nothing outside ``sslx.data`` asks which of the three a source is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from sslx.console import activity
from sslx.console.words import one_line, shown
from sslx.data import identity
from sslx.data.codecs import levels as black_and_white
from sslx.data.codecs.formats import Levels
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.config import Config as Reading
from sslx.data.facts import Facts
from sslx.data.patience import Caller, Patience
from sslx.data.sources.config import SourceConfig, Split
from sslx.data.sources.listing import silent

Indices = npt.NDArray[np.int64]
T = TypeVar("T")
_CLASSES_TOLD = 5


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a source may need to find its images, beside its own options.

    classes: the names of the training images' classes, in the order of their numbers, for a test split; None for all
    others.  say: takes a line on how far a long search has come.  timeout_s: how long a disk may be silent.
    """

    classes: Sequence[str] | None = None
    say: Callable[[str], None] = silent
    timeout_s: float = 300.0

    def call(self, what: str, function: Callable[[Callable[[str], None]], T]) -> T:
        """``function(say)``, in a thread: StorageError where a disk does not answer and no line is said for too long.

        what: is waited for, in the message.
        """
        with Caller(Patience(self.timeout_s, say=self.say), lambda: what) as call:
            return call(partial(function, call.alive(self.say)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """Images by index.

    name: for messages.  unlabeled: why there are no labels.  notes: what a user should know, a line each.
    """

    name: str
    facts: Facts
    unlabeled: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.facts.num_samples

    @abstractmethod
    def where(self, index: int) -> str:
        """How a message names the image at this place."""

    @abstractmethod
    def take(self, index: Indices) -> Self:
        """The images at these places, (K,), as a source of their own."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Which images these are, as a checkpoint holds it: plain data with a hex ``digest``, small for any number."""

    def difference(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """How these images, whose ``identity()`` is ``now``, differ from those of ``before``, in words; "" if not."""
        return "" if before.get("digest") == now["digest"] else "other images, or other labels"

    def describe(self) -> str:
        """One line for the user: what was found."""
        kinds = "unlabeled" + (f": {self.unlabeled}" if self.unlabeled else "")
        if classes := self.facts.classes:
            more = ", ..." if len(classes) > _CLASSES_TOLD else ""
            kinds = f"{_plural(len(classes), 'class', 'classes')} ({', '.join(classes[:_CLASSES_TOLD])}{more})"
        return f"{self.name}: {_plural(len(self), 'image', 'images')}, {kinds}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Pixels(Source):
    """Decoded images in memory.

    pixels: (N, H, W, C) uint8, or, where sizes differ, an array of N such arrays without the first dimension.
    is_exact: whether every machine makes the same pixels; sines, for one, may round differently on another CPU.
    """

    pixels: npt.NDArray[Any] = field(repr=False)
    is_exact: bool = True

    def __post_init__(self) -> None:
        first = self.pixels[0] if len(self.pixels) else np.empty((1, 1, self.facts.channels.num), dtype=np.uint8)
        if len(self.pixels) != len(self) or first.ndim != 3 or first.shape[-1] != self.facts.channels.num:
            raise ValueError(
                f"the source {self.name} says that it has {len(self):,} images of {self.facts.channels.num} channels, "
                f"and its pixels are {len(self.pixels):,} arrays of shape {first.shape}: expected (H, W, C) each"
            )

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), pixels=self.pixels[index])

    def identity(self) -> dict[str, Any]:
        """digest: of the labels and 64 of the images."""
        images = identity.spread(len(self)) if self.is_exact else []
        parts = [self.name.encode(), *(np.ascontiguousarray(self.pixels[i]).tobytes() for i in images)]
        return {"digest": identity.digest(self.facts, parts)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Coded(Source):
    """Image files that are to be decoded, by paths or by bytes.

    levels: black and white of files that do not state them; None: measured when the first image is read.
    """

    levels: Levels | None = field(default=None, repr=False)

    @abstractmethod
    def files(self, index: Indices) -> Sequence[File]:
        """The paths or the bytes of the image files at these places.  Raises Unreadable with the reason."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Files(Coded):
    """Image files by their paths.  root: what all paths begin with."""

    paths: Sequence[str] = field(repr=False)
    root: str = ""

    def where(self, index: int) -> str:
        return shown(self.paths[index])

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), paths=self.files(index))

    def files(self, index: Indices) -> Sequence[str]:
        return [self.paths[int(i)] for i in index]

    def identity(self) -> dict[str, Any]:
        return identity.of_paths(self.facts, self.paths, self.root)

    def difference(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        return identity.paths_differ(before, now, len(self), lambda i: shown(self.paths[i][len(self.root) :]))


class Reader(Protocol):
    """What reads the image files of an ``Encoded`` source.  It must be picklable: worker processes get a copy."""

    def read(self, rows: Indices) -> Sequence[bytes]:
        """The bytes of the image files in these rows.  Whatever it raises counts as: this image cannot be read."""
        ...

    def where(self, row: int) -> str:
        """How a message names the image in this row."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded(Coded):
    """Image files whose bytes a reader brings, as from an archive, a table or a database.

    rows: (N,) of the images in the reader's numbers; None: it has them in this order.
    """

    reader: Reader = field(repr=False)
    rows: Indices | None = field(default=None, repr=False)

    def where(self, index: int) -> str:
        return shown(self.reader.where(index if self.rows is None else int(self.rows[index])))

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), rows=index if self.rows is None else self.rows[index])

    def files(self, index: Indices) -> Sequence[bytes]:
        try:
            return self.reader.read(index if self.rows is None else self.rows[index])
        except (Unreadable, MemoryError):
            raise
        except Exception as error:  # of any library that a reader uses
            raise Unreadable(f"{type(error).__name__}: {one_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        """digest: of the number of images and their labels.  contents: (64,) int64, of as many images."""
        return {"digest": identity.digest(self.facts, []), "contents": identity.contents(len(self), self._bytes)}

    def difference(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        return super().difference(before, now) or identity.contents_differ(before, now, len(self), self.where)

    def _bytes(self, index: int) -> bytes:
        return self.files(np.array([index]))[0]


def build(
    config: SourceConfig,
    split: Split,
    reading: Reading | None = None,
    *,
    say: Callable[[str], None] = silent,
    training: Source | None = None,
) -> Source:
    """The images of a split of a source.

    reading: how images are read; default: its defaults.  say: gets a line now and then while files are listed, and
    what was found of the images' range.  training: the training split, for a test split, which then has its classes and
    its black and white; a folder's images of other classes are left out.  Raises MissingInput, DataError or
    ConfigError, each in one line, and StorageError for a disk that does not answer.
    """
    reading = reading or Reading()
    context = Context(classes=training.facts.classes if training else None, say=say, timeout_s=reading.timeout_s)
    source = config.build(split, context)
    if not isinstance(source, Coded) or source.levels:
        return source
    levels = training.levels if isinstance(training, Coded) else None
    if reading.range != "auto":
        levels = Levels(chosen=reading.range)
    if levels is None:
        with activity.doing("measuring the range of the images"):
            levels = context.call(
                f"the first look at the images of {source.name}", lambda tell: black_and_white.measure(source, tell)
            )
    return replace(source, levels=levels)


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
