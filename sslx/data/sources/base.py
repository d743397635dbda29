"""Sources: images to read.  A Source has facts about its images and gives access to them in one of three ways.

``Pixels`` holds decoded images in memory, ``Files`` has paths that a backend reads itself, and ``Encoded`` reads the
bytes of each image file from any storage.  Nothing outside ``sslx.data`` depends on which of the three a source is.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from sslx.console import activity
from sslx.console.words import one_line, plural, shown
from sslx.data import identity, retries
from sslx.data.codecs.formats import Levels
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.config import Config as Reading
from sslx.data.facts import Facts
from sslx.data.sources.config import SourceConfig, Split
from sslx.data.sources.listing import silent
from sslx.data.sources.paths import Paths
from sslx.data.waiting import Caller, WaitPolicy, reporting_to
from sslx.errors import UserError

Indices = npt.NDArray[np.int64]
T = TypeVar("T")
_MAX_CLASSES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a source may need to find its images, apart from its own options.

    classes: for a test split, the names of the training images' classes in the order of their labels; None for other
    splits.  say: takes a line about the progress of a long search.  timeout_s: how long a disk may not answer.
    """

    classes: Sequence[str] | None = None
    say: Callable[[str], None] = silent
    timeout_s: float = 300.0

    def call(self, what: str, function: Callable[[Callable[[str], None]], T]) -> T:
        """Return ``function(say)``, called in a thread.

        Raises StorageError after ``timeout_s`` without an answer of the disk or a line.  what: what the error names as
        waited for.
        """
        with Caller(WaitPolicy(self.timeout_s, say=self.say), lambda: what) as call, reporting_to(self.say):
            return call(partial(function, call.alive(self.say)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Source(ABC):
    """Images by index.

    name: the source's name in messages.  unlabeled: why there are no labels.  notes: lines that a user should know.
    """

    name: str
    facts: Facts
    unlabeled: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.facts.num_samples

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders, each with a slash at its end, that the images' paths may be given relative to."""
        return ()

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the name of the image at this index for messages."""

    def path(self, index: int) -> str:
        """Return the path of the image at this index as it is, or the image's name if it is no file."""
        return self.where(index)

    @abstractmethod
    def take(self, index: Indices) -> Self:
        """Return a source of the images at these indices (K,)."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the images' identity for checkpoints: plain data with a hex ``digest``, small for any number."""

    def difference(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """Describe how these images, whose ``identity()`` is ``now``, differ from those of ``before``; "" if not."""
        return "" if before.get("digest") == now["digest"] else "other images, or other labels"

    def describe(self) -> str:
        """Return one line for the user about the images."""
        kinds = "unlabeled" + (f": {self.unlabeled}" if self.unlabeled else "")
        if classes := self.facts.classes:
            more = ", ..." if len(classes) > _MAX_CLASSES_SHOWN else ""
            kinds = f"{plural(len(classes), 'class', 'classes')} ({', '.join(classes[:_MAX_CLASSES_SHOWN])}{more})"
        return f"{self.name}: {plural(len(self), 'image')}, {kinds}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Pixels(Source):
    """Decoded images in memory.

    pixels: (N, H, W, C) of the number and type in ``facts.channels``, or, if sizes differ, an object array of N arrays
    (H, W, C).
    is_exact: whether every machine makes the same pixels.  Sines, for example, may round differently on another CPU.
    """

    pixels: npt.NDArray[Any] = field(repr=False)
    is_exact: bool = True

    def __post_init__(self) -> None:
        channels = self.facts.channels
        first = self.pixels[0] if len(self.pixels) else np.empty((1, 1, channels.num), dtype=channels.dtype)
        is_announced = len(self.pixels) == len(self) and first.ndim == 3 and first.shape[-1] == channels.num
        if not is_announced or first.dtype != channels.dtype:
            raise ValueError(
                f"the facts of source {self.name} announce {len(self):,} images of {channels.num} channels of type "
                f"{channels.dtype}, but its pixels are {len(self.pixels):,} arrays of shape {first.shape} of type "
                f"{first.dtype}: expected (H, W, C) each"
            )

    def read(self, index: int) -> npt.NDArray[Any]:
        """Return an image (H, W, C).  Raises Unreadable for floats that are not finite."""
        image: npt.NDArray[Any] = self.pixels[index]
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise Unreadable("some of its values are not finite numbers")
        return image

    @property
    def is_gray(self) -> bool:
        """Whether the channels are the same place in memory, as ``gray_as_rgb`` makes them."""
        return self.pixels.dtype != object and self.pixels.strides[-1] == 0

    def where(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), pixels=self.pixels[index])

    def identity(self) -> dict[str, Any]:
        """Return a digest of the labels and 64 of the images."""
        images = identity.spread(len(self)) if self.is_exact else []
        parts = [self.name.encode(), *(np.ascontiguousarray(self.pixels[i]).tobytes() for i in images)]
        return {"digest": identity.digest(self.facts, parts)}


def gray_as_rgb(gray: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return gray images (N, H, W) as (N, H, W, 3), three equal channels in the same memory."""
    return np.lib.stride_tricks.as_strided(gray, (*gray.shape, 3), (*gray.strides, 0))


@dataclass(frozen=True, eq=False, kw_only=True)
class Coded(Source):
    """Image files to decode, given as paths or bytes.

    levels: black and white of files that do not state them.  If None, they are measured when the first image is read.
    timeout_s: how long a read that the storage refuses for the moment is tried again (``retries``).
    """

    levels: Levels | None = field(default=None, repr=False)
    timeout_s: float = field(default=300.0, repr=False)

    @abstractmethod
    def files(self, index: Indices) -> Sequence[File]:
        """Return the paths or bytes of the image files at these indices.  Raises Unreadable with the reason."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Files(Coded):
    """Image files by their paths, which are kept packed.  root: the beginning of all paths, if they come as a list."""

    paths: Sequence[str] = field(repr=False)
    root: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Paths) or (self.root and self.paths.roots != (self.root,)):
            object.__setattr__(self, "paths", Paths.of(self.paths, self.root))

    @property
    def packed(self) -> Paths:
        """The paths."""
        assert isinstance(self.paths, Paths)
        return self.paths

    @property
    def roots(self) -> tuple[str, ...]:
        return self.packed.roots

    def where(self, index: int) -> str:
        return shown(self.paths[index])

    def path(self, index: int) -> str:
        return self.paths[index]

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), paths=self.packed.take(index))

    def files(self, index: Indices) -> Sequence[str]:
        return [self.paths[int(i)] for i in index]

    def identity(self) -> dict[str, Any]:
        return identity.of_paths(self.facts, self.packed.below_roots(), self.path)

    def difference(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        return identity.paths_differ(before, now, len(self), self._short)

    def _short(self, index: int) -> str:
        """Return a name for messages: without the root, if there is only one."""
        path = self.paths[index]
        return shown(path[len(self.roots[0]) :] if len(self.roots) == 1 else path)


class Reader(Protocol):
    """Reads the image files of an ``Encoded`` source.  It must be picklable, since worker processes get a copy."""

    def read(self, rows: Indices) -> Sequence[bytes]:
        """Return the bytes of the image files in these rows.

        Errors of the storage are waited out (``retries.may_pass``).  Any other exception marks an image as unreadable.
        """
        ...

    def where(self, row: int) -> str:
        """Return the name of the image in this row for messages."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True)
class Encoded(Coded):
    """Image files whose bytes come from a reader, for example of an archive, a table or a database.

    rows: (N,) the images' rows in the reader, or None if row i is image i.
    """

    reader: Reader = field(repr=False)
    rows: Indices | None = field(default=None, repr=False)

    def where(self, index: int) -> str:
        return shown(self.reader.where(index if self.rows is None else int(self.rows[index])))

    def take(self, index: Indices) -> Self:
        return replace(self, facts=self.facts.take(index), rows=index if self.rows is None else self.rows[index])

    def files(self, index: Indices) -> Sequence[bytes]:
        rows = index if self.rows is None else self.rows[index]
        try:
            return retries.until_read(lambda: self.reader.read(rows), lambda: self._place(index), self.timeout_s)
        except (Unreadable, MemoryError, UserError):
            raise
        except Exception as error:  # from any library that a reader uses
            raise Unreadable(f"{type(error).__name__}: {one_line(error)}") from error

    def _place(self, index: Indices) -> str:
        """Return the name of the first of these images for messages."""
        return self.where(int(index[0]))

    def identity(self) -> dict[str, Any]:
        """Return a digest of the number of images and their labels, and (K,) int64 checksums of K images' contents."""
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
    """Return the images of a split of a source.

    reading: the settings for reading images.  say: takes lines about the progress of listing files and about the
    images' measured range.  training: for a test split, the training split, whose classes, channels and range it takes
    over; a folder's test images of other classes are left out.  Raises MissingInput, DataError or ConfigError, each in
    one line, and StorageError for a disk that does not answer.
    """
    from sslx.data.sources import channels  # here: it needs the kinds of sources of this module

    reading = reading or Reading()
    context = Context(classes=training.facts.classes if training else None, say=say, timeout_s=reading.timeout_s)
    source = config.build(split, context)
    if isinstance(source, Coded):
        source = replace(source, timeout_s=reading.timeout_s)
    if isinstance(source, Pixels) and source.facts.channels.dtype == "uint8" and reading.channels is None:
        return source
    with activity.doing("measuring the range of the images"):
        return context.call(
            f"the range of the images of {source.name}",
            lambda say_line: channels.settled(source, reading, training, say_line),
        )
