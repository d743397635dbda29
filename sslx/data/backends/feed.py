"""What DALI's graph is fed for each batch: files or pixels, ahead of time, and the parameters that it takes itself."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sslx.data import views
from sslx.data.codecs.headers import Unreadable
from sslx.data.order import Order
from sslx.data.views import Draw, ViewSpec

if TYPE_CHECKING:
    from sslx.data.backends.dali import Dali

Indices = npt.NDArray[np.int64]
_AHEAD = 2  # batches whose odd images are read before they are fed
_NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
_ONE = np.ones(1, dtype=np.float32)


def fed_parameters(spec: ViewSpec, gpu: bool) -> list[str]:
    """The drawn parameters that the graph takes from outside for one view, in the order in which they are fed."""
    augment = spec.augment
    if gpu or augment is None or augment.jitter == 0:
        return []
    return [name for name in ("brightness", "contrast") if getattr(augment, name) > 0]


class _Images:
    """What the graph is fed for the images of a batch; the reading of odd ones begins here."""

    def __init__(self, dali: "Dali", files: Indices) -> None:
        self.source, self.files, self.triage = dali.source, files, dali.triage
        self.plain = np.ones(len(files), dtype=np.bool_)
        self.error: Unreadable | None = None
        self.odd: dict[np.int64, Future[npt.NDArray[np.uint8]]] = {}
        if self.source.pixels is None:
            try:
                self.plain = self.triage.plain(files)
            except Unreadable as error:
                self.error = error
            odd = files[~self.plain]
            self.odd = dict(zip(odd, self.triage.pixels(odd), strict=True))

    def inputs(self, branched: bool) -> list[Any]:
        """For the graph with a branch or without one.  Raises Unreadable."""
        if self.error is not None:
            raise self.error
        if self.source.pixels is not None:
            pixels = self.source.pixels[self.files]
            return [list(pixels) if pixels.dtype == object else pixels]
        paths = self.triage.paths(self.files)
        if not branched:
            return [paths]
        odd = {i: pixels.result() for i, pixels in self.odd.items()}
        return [paths, [odd.get(i, _NO_PIXELS) for i in self.files], ~self.plain]


class Feed:
    """The inputs of each batch: the images, then every view's parameters.

    It ends with the order, before a batch that needs the graph with a branch, or with an ``error``.
    ahead: what was drawn for batches that DALI is still making.  uncropped: and for those whose images it has yet to
    look at.
    """

    def __init__(self, dali: "Dali", order: Order, start: int, substitute: Callable[[Indices], Indices]) -> None:
        self.dali, self.order, self.start, self.substitute = dali, order, start, substitute
        self.ahead: deque[list[Draw | None]] = deque()
        self.uncropped: deque[list[Draw | None]] = deque()
        self.error: Unreadable | None = None

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        t, images = self.start, deque[_Images]()
        while not self.order.finished(t):
            while len(images) <= _AHEAD and not self.order.finished(t + len(images)):
                files = self.substitute(self.order.batch(t + len(images)))
                images.append(_Images(self.dali, files))
            batch = images.popleft()
            if batch.odd and not self.dali.branched:
                self.dali.branched = True
                return
            try:
                inputs = batch.inputs(self.dali.branched)
            except Unreadable as error:
                self.error = error
                return
            drawn = views.draws(self.dali.specs, self.dali.seed, self.order.epoch(t), self.order.batch(t))
            for spec, one in zip(self.dali.specs, drawn, strict=True):
                inputs += [getattr(one, name) for name in fed_parameters(spec, self.dali.gpu)]
            self.ahead.append(drawn)
            self.uncropped.append(drawn)
            yield tuple(inputs)
            t += 1


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
