"""The inputs of DALI's graph for each batch: files or pixels, read ahead of time, and some of the views' parameters."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sslx.data import views
from sslx.data.ahead import ahead
from sslx.data.backends import turns
from sslx.data.backends.dali_files import DaliFiles
from sslx.data.codecs.headers import Unreadable
from sslx.data.planner import Planner, Work
from sslx.data.sources import Files, Pixels
from sslx.data.transfer import Staged
from sslx.data.views import Draw, ViewSpec
from sslx.errors import UserError

if TYPE_CHECKING:
    from sslx.data.backends.dali import Dali

Indices = npt.NDArray[np.int64]
_NUM_AHEAD = 2  # batches whose images begin to be read before they are fed, if DALI does not read them itself
_NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
_NO_BYTES = np.zeros(1, dtype=np.uint8)
_ONE = np.ones(1, dtype=np.float32)


def fed_parameters(spec: ViewSpec, gpu: bool) -> list[str]:
    """Return the names of one view's drawn parameters that are fed to the graph, in order."""
    augment = spec.augment
    if gpu or augment is None or augment.jitter == 0 or turns.delays_jitter(spec):
        return []
    return [name for name in ("brightness", "contrast") if getattr(augment, name) > 0]


class _InMemory:
    """The inputs of the graph for a batch of decoded images."""

    is_odd = False

    def __init__(self, source: Pixels, files: Indices) -> None:
        self._pixels = np.ascontiguousarray(source.pixels[files])  # mapped arrays may have another order in memory

    def inputs(self, branched: bool) -> list[Any]:
        assert not branched, "decoded images need no branch"
        return [list(self._pixels) if self._pixels.dtype == object else self._pixels]


class _ByPath:
    """The inputs of the graph for a batch of files that DALI opens itself.  Threads begin to read odd files here."""

    def __init__(self, source: Files, dali_files: DaliFiles, files: Indices) -> None:
        self._source, self._files = source, files
        self._plain = np.ones(len(files), dtype=np.bool_)
        self._error: Unreadable | None = None
        try:
            self._plain = dali_files.plain(files)
        except Unreadable as error:
            self._error = error
        odd = files[~self._plain]
        self.is_odd = len(odd) > 0
        self._odd = dict(zip(odd.tolist(), dali_files.pixels(odd), strict=True))

    def inputs(self, branched: bool) -> list[Any]:
        """Return the inputs of the graph with or without a branch.  Raises Unreadable."""
        if self._error is not None:
            raise self._error
        # The bytes of the paths, (B, length), padded with zeros as terminators.
        paths = np.array([os.fsencode(path) for path in self._source.files(self._files)])
        paths = paths.view(np.uint8).reshape(len(self._files), -1)
        if not branched:
            return [paths]
        odd = {i: pixels.result() for i, pixels in self._odd.items()}
        return [paths, [odd.get(i, _NO_PIXELS) for i in self._files.tolist()], ~self._plain]


class _ByBytes:
    """The inputs of the graph for a batch of files whose bytes come from a reader, which threads begin to call here."""

    def __init__(self, dali_files: DaliFiles, files: Indices) -> None:
        self._parts = dali_files.fetched(files)

    @cached_property
    def _images(self) -> list[npt.NDArray[np.uint8]]:
        return [image for part in self._parts for image in part.result()]

    @property
    def is_odd(self) -> bool:
        """Whether DALI cannot decode some of the images.  Waits for the reader and raises Unreadable."""
        return any(image.ndim == 3 for image in self._images)

    def inputs(self, branched: bool) -> list[Any]:
        """Return the inputs of the graph with or without a branch."""
        if not branched:
            return [self._images]
        odd = np.array([image.ndim == 3 for image in self._images])
        pairs = list(zip(self._images, odd.tolist(), strict=True))
        encoded = [_NO_BYTES if is_odd else image for image, is_odd in pairs]
        return [encoded, [image if is_odd else _NO_PIXELS for image, is_odd in pairs], odd]


@dataclass(frozen=True)
class Prepared:
    """A batch's inputs from the host, apart from its images: ``fed`` goes to the graph, ``staged`` later to torch."""

    work: Work
    fed: list[npt.NDArray[np.float32]]
    staged: Staged


class Feed:
    """The inputs of each batch: the images, then every view's parameters.

    It ends with the order, before the first batch that needs the graph with a branch, or with an ``error``.
    ahead: batches that DALI is still making.  uncropped: the draws of those whose image shapes DALI has yet to find.
    """

    def __init__(self, dali: "Dali", planner: Planner, start: int) -> None:
        self.dali, self.planner, self.start = dali, planner, start
        self.ahead: deque[Prepared] = deque()
        self.uncropped: deque[list[Draw | None]] = deque()
        self.error: Unreadable | UserError | None = None
        self._batches = ahead(self._prepared, start, dali.device)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        waiting = deque[tuple[Prepared, _InMemory | _ByPath | _ByBytes]]()
        while True:
            for batch in islice(self._batches, min(_NUM_AHEAD, self.dali.prefetch or _NUM_AHEAD) + 1 - len(waiting)):
                waiting.append((batch, self._images(batch.work.files)))
            if not waiting:
                return
            batch, images = waiting.popleft()
            try:
                if images.is_odd and not self.dali.branched:
                    self.dali.branched = True
                    return
                inputs = images.inputs(self.dali.branched)
            except (Unreadable, UserError) as error:
                self.error = error
                return
            self.ahead.append(batch)
            self.uncropped.append(batch.work.draws)
            yield (*inputs, *batch.fed)

    def close(self) -> None:
        """Stop preparing batches."""
        with suppress(ValueError):  # an abandoned thread still hangs in the generator
            self._batches.close()

    def _images(self, files: Indices) -> _InMemory | _ByPath | _ByBytes:
        source = self.dali.source
        if isinstance(source, Pixels):
            return _InMemory(source, files)
        return (
            _ByPath(source, self.dali.files, files) if isinstance(source, Files) else _ByBytes(self.dali.files, files)
        )

    def _prepared(self, t: int) -> Prepared | None:
        work = self.planner(t)
        return None if work is None else self.dali.prepare(work)


def crop_boxes(
    specs: Sequence[ViewSpec], uncropped: deque[list[Draw | None]], shapes: list[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.float32]], ...]:
    """Return the start and end (y, x) of each view's crops, then ones.  shapes: (H, W, C) of each image in a batch."""
    height, width = np.array(shapes)[:, :2].T
    corners: list[list[npt.NDArray[np.float32]]] = []
    for spec, drawn in zip(specs, uncropped.popleft(), strict=True):
        box = views.boxes(spec, drawn, height, width).astype(np.float32)
        if drawn is not None:
            upside_down, flipped = turns.reversed_axes(drawn)
            box[flipped] = box[flipped][:, [0, 3, 2, 1]]
            box[upside_down] = box[upside_down][:, [2, 1, 0, 3]]
        corners += [list(box[:, :2]), list(box[:, 2:])]
    return *corners, [_ONE] * len(shapes)
