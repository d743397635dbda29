"""What DALI's graph is fed for each batch: files or pixels, ahead of time, and the parameters that it takes itself."""

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
from sslx.data.backends.triage import Triage
from sslx.data.codecs.headers import Unreadable
from sslx.data.planner import Planner, Work
from sslx.data.sources import Files, Pixels
from sslx.data.transfer import Staged
from sslx.data.views import Draw, ViewSpec

if TYPE_CHECKING:
    from sslx.data.backends.dali import Dali

Indices = npt.NDArray[np.int64]
_AHEAD = 2  # batches whose images are read before they are fed, where they are not for DALI to read
_NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
_NO_BYTES = np.zeros(1, dtype=np.uint8)
_ONE = np.ones(1, dtype=np.float32)


def fed_parameters(spec: ViewSpec, gpu: bool) -> list[str]:
    """The drawn parameters that the graph takes from outside for one view, in the order in which they are fed."""
    augment = spec.augment
    if gpu or augment is None or augment.jitter == 0:
        return []
    return [name for name in ("brightness", "contrast") if getattr(augment, name) > 0]


class _InMemory:
    """What the graph is fed for a batch of images that are decoded already."""

    is_odd = False

    def __init__(self, source: Pixels, files: Indices) -> None:
        self._pixels = source.pixels[files]

    def inputs(self, branched: bool) -> list[Any]:
        assert not branched, "of decoded images none is odd"
        return [list(self._pixels) if self._pixels.dtype == object else self._pixels]


class _ByPath:
    """What the graph is fed for a batch of files that DALI opens itself; the reading of odd ones begins here."""

    def __init__(self, source: Files, triage: Triage, files: Indices) -> None:
        self._source, self._files = source, files
        self._plain = np.ones(len(files), dtype=np.bool_)
        self._error: Unreadable | None = None
        try:
            self._plain = triage.plain(files)
        except Unreadable as error:
            self._error = error
        odd = files[~self._plain]
        self.is_odd = len(odd) > 0
        self._odd = dict(zip(odd.tolist(), triage.pixels(odd), strict=True))

    def inputs(self, branched: bool) -> list[Any]:
        """For the graph with a branch or without one.  Raises Unreadable."""
        if self._error is not None:
            raise self._error
        # The bytes of the paths, padded with zeros, where C's strings end: (B, length).
        paths = np.array([os.fsencode(path) for path in self._source.files(self._files)])
        paths = paths.view(np.uint8).reshape(len(self._files), -1)
        if not branched:
            return [paths]
        odd = {i: pixels.result() for i, pixels in self._odd.items()}
        return [paths, [odd.get(i, _NO_PIXELS) for i in self._files.tolist()], ~self._plain]


class _ByBytes:
    """What the graph is fed for a batch of files whose bytes a reader brings; threads begin with it here."""

    def __init__(self, triage: Triage, files: Indices) -> None:
        self._parts = triage.fetched(files)

    @cached_property
    def _images(self) -> list[npt.NDArray[np.uint8]]:
        return [image for part in self._parts for image in part.result()]

    @property
    def is_odd(self) -> bool:
        """Whether some are not for DALI to decode.  Waits for the reader, and raises Unreadable."""
        return any(image.ndim == 3 for image in self._images)

    def inputs(self, branched: bool) -> list[Any]:
        """For the graph with a branch or without one."""
        if not branched:
            return [self._images]
        odd = np.array([image.ndim == 3 for image in self._images])
        pairs = list(zip(self._images, odd.tolist(), strict=True))
        encoded = [_NO_BYTES if is_odd else image for image, is_odd in pairs]
        return [encoded, [image if is_odd else _NO_PIXELS for image, is_odd in pairs], odd]


@dataclass(frozen=True)
class Prepared:
    """What the host has made for a batch: what the graph takes beside the images, and all that torch takes later."""

    work: Work
    fed: list[npt.NDArray[np.float32]]
    staged: Staged


class Feed:
    """The inputs of each batch: the images, then every view's parameters.

    It ends with the order, before a batch that needs the graph with a branch, or with an ``error``.
    ahead: batches that DALI is still making.  uncropped: and those whose images it has yet to look at.
    """

    def __init__(self, dali: "Dali", planner: Planner, start: int) -> None:
        self.dali, self.planner, self.start = dali, planner, start
        self.ahead: deque[Prepared] = deque()
        self.uncropped: deque[list[Draw | None]] = deque()
        self.error: Unreadable | None = None
        self._batches = ahead(self._prepared, start, dali.device)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        waiting = deque[tuple[Prepared, _InMemory | _ByPath | _ByBytes]]()
        while True:
            for batch in islice(self._batches, _AHEAD + 1 - len(waiting)):
                waiting.append((batch, self._images(batch.work.files)))
            if not waiting:
                return
            batch, images = waiting.popleft()
            try:
                if images.is_odd and not self.dali.branched:
                    self.dali.branched = True
                    return
                inputs = images.inputs(self.dali.branched)
            except Unreadable as error:
                self.error = error
                return
            self.ahead.append(batch)
            self.uncropped.append(batch.work.draws)
            yield (*inputs, *batch.fed)

    def close(self) -> None:
        """Prepare nothing more."""
        with suppress(ValueError):  # a thread that was given up hangs in it
            self._batches.close()

    def _images(self, files: Indices) -> _InMemory | _ByPath | _ByBytes:
        source = self.dali.source
        if isinstance(source, Pixels):
            return _InMemory(source, files)
        return (
            _ByPath(source, self.dali.triage, files) if isinstance(source, Files) else _ByBytes(self.dali.triage, files)
        )

    def _prepared(self, t: int) -> Prepared | None:
        work = self.planner(t)
        return None if work is None else self.dali.prepare(work)


def crop_boxes(
    specs: Sequence[ViewSpec], uncropped: deque[list[Draw | None]], shapes: list[npt.NDArray[np.int64]]
) -> tuple[list[npt.NDArray[np.float32]], ...]:
    """Where each view's crop starts and ends, (y, x) a sample, from the (H, W, C) of a batch's images; then ones."""
    height, width = np.array(shapes)[:, :2].T
    corners: list[list[npt.NDArray[np.float32]]] = []
    for spec, drawn in zip(specs, uncropped.popleft(), strict=True):
        box = views.boxes(spec, drawn, height, width).astype(np.float32)
        if drawn is not None:
            flipped = drawn.flip > 0
            box[flipped] = box[flipped][:, [0, 3, 2, 1]]
        corners += [list(box[:, :2]), list(box[:, 2:])]
    return *corners, [_ONE] * len(shapes)
