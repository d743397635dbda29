"""Data sets that fit into memory: decoded once, kept as uint8 on the views' device, cropped there in batches.

Nothing is read or decoded in training, so that a GPU needs no loader threads and no decoder beside it.  A crop and its
antialiased resize are linear in the pixels, down and across: sums of rows with each sample's own filters, which
are zero outside of its box, so that images of several sizes stand in one padded tensor.  The filters are those of PIL
and torchvision: a triangle, or Keys' cubic (IEEE TASSP 29, 1981) with a = -0.5, stretched where a crop is shrunk.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx import distributed
from sslx.console import activity
from sslx.data import views
from sslx.data.ahead import ahead
from sslx.data.backends import row_sums
from sslx.data.backends.color import Finish, jitter, jitter_parameters
from sslx.data.backends.torchvision import read
from sslx.data.codecs.headers import Unreadable
from sslx.data.patience import Patience
from sslx.data.planner import Planner, Work
from sslx.data.sources import Pixels, Source
from sslx.data.transfer import Arrays, Delivery, Staged, send, stage
from sslx.data.views import Draw, ViewSpec
from sslx.data.workers import Deadly, Pool, answer_alone, unseen
from sslx.errors import ConfigError

Indices = npt.NDArray[np.int64]
Image = npt.NDArray[np.uint8]
_SAY_EVERY_S = 3.0
_SHARE = 0.5  # of the memory
_CHUNK = 32  # images that a worker hands over at once


@dataclass(frozen=True)
class Prepared:
    """What the host has made for a batch.  cropping: each view's arrays for ``Crop``.  staged: all for the device."""

    work: Work
    cropping: list[Arrays]
    staged: Staged


class Resident:
    """Batches of views, made from images in memory.

    specs: one per view.  device: of the images and the views.  num_threads: processes that decode, at the start.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        device: torch.device,
        num_threads: int,
        say: Callable[[str], None] = lambda _: None,
        patience: Patience | None = None,
    ) -> None:
        self.source, self.specs = source, tuple(specs)
        self.device, self.num_threads, self.say = device, num_threads, say
        self.patience = patience or Patience()
        self._steps = [(Crop(spec), Finish(spec, device)) for spec in self.specs]
        self._deadly: dict[int, str] = {}
        self._reasons: dict[int, str] = {}
        self._sides = np.zeros((len(source), 2), dtype=np.int64)
        self._pixels: Tensor | None = None

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batch start, start + 1, ...: one (B, 3, H, W) float32 channels_last tensor a view; what came along.

        Raises RuntimeError where a file of the batch could not be decoded; the stream is then at its end.
        """
        if planner(start) is None:
            return
        pixels = self._images()
        with closing(ahead(partial(self._prepared, planner), start, self.device)) as prepared:
            for batch in prepared:
                if not self._reasons.keys().isdisjoint(batch.work.files.tolist()):
                    raise RuntimeError("an unreadable image")
                yield self._make(pixels, batch)

    def _prepared(self, planner: Planner, t: int) -> "Prepared | None":
        work = planner(t)
        return None if work is None else self.prepare(work)

    def prepare(self, work: Work) -> "Prepared":
        """What the host makes for a batch, once the images are decoded."""
        drawn, sides = work.draws, self._sides[work.files]
        cropping = [crop.parameters(one, sides) for one, (crop, _) in zip(drawn, self._steps, strict=True)]
        finishing = [finish.parameters(one) for one, (_, finish) in zip(drawn, self._steps, strict=True)]
        both = [{**crop, **finish} for crop, finish in zip(cropping, finishing, strict=True)]
        return Prepared(work, cropping, stage([{"files": work.files}, work.along, *both], self.device))

    def _make(self, pixels: Tensor, batch: "Prepared") -> Delivery:
        """A batch from the images in memory."""
        chosen, came, *sent = batch.staged.send()
        images = pixels[chosen["files"]].float()
        views = [
            finish(one, crop(one, images, parameters, there), there)
            for one, (crop, finish), parameters, there in zip(
                batch.work.draws, self._steps, batch.cropping, sent, strict=True
            )
        ]
        return Delivery(batch.work.index, tuple(views), came)

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images could not be decoded, and why."""
        self._images()
        return {int(i): self._reasons[int(i)] for i in index if int(i) in self._reasons}

    def _images(self) -> Tensor:
        """(N, 3, H, W) uint8 on the device; decoded at the first call, each in the upper left corner of its place."""
        if self._pixels is None:
            decoded: list[Tensor | None] = []
            while not decoded:
                try:
                    with activity.doing("decoding the images into memory"):
                        decoded = self._decode()
                except Deadly as error:
                    self._deadly[error.index] = str(error)
            shape = (len(decoded), 3, *self._sides.max(axis=0).tolist())
            everyone = torch.zeros(shape, dtype=torch.uint8)
            for i, image in enumerate(decoded):
                if image is not None:
                    everyone[i, :, : image.shape[1], : image.shape[2]] = image
                decoded[i] = None
            self._pixels = everyone.to(self.device)
        return self._pixels

    def _chunks(self) -> Iterator[list[Image | str]]:
        numbers = range(-(-len(self.source) // _CHUNK))
        work = partial(_read_chunk, self.source, self._deadly)
        if self.num_threads == 0 or isinstance(self.source, Pixels):
            yield from map(work, numbers)
            return
        workers = min(self.num_threads, len(numbers))
        pool = Pool(work, workers, place_bytes=0, patience=self.patience, name=self.source.where)
        try:
            yield from pool.results(numbers, answer_alone)
        finally:
            pool.close()

    def _decode(self) -> list[Tensor | None]:
        """Every image, None where it cannot be read.  ConfigError where all together are too many.

        By processes: of 32 px JPEGs, two threads decode fewer in a second than one does (Python's lock).
        """
        count = len(self.source)
        host = _memory(torch.device("cpu")) / 2 / distributed.local_world_size()  # decoded, and put together
        most = _SHARE * min(_memory(self.device), host)
        decoded: list[Tensor | None] = []
        largest, said = np.zeros(2, dtype=np.int64), time.monotonic()
        for chunk in self._chunks():
            self.patience.check_stop()
            for image in chunk:
                i = len(decoded)
                if isinstance(image, str):
                    self._reasons[i] = image
                    decoded.append(None)
                    continue
                self._sides[i] = image.shape[1:]
                largest = np.maximum(largest, self._sides[i])
                decoded.append(torch.from_numpy(image))
            needed = 3 * count * int(largest.prod())
            if needed > most:
                raise ConfigError(
                    f"{count:,} images of up to {'x'.join(map(str, largest))} px would take "
                    f"{needed / 2**30:.1f} GiB, more than half of the memory: take --data.backend auto"
                )
            if time.monotonic() - said > _SAY_EVERY_S:
                self.say(f"decoded {len(decoded):,} of {count:,} images into memory")
                said = time.monotonic()
        return decoded


def _read_chunk(
    source: Source,
    deadly: dict[int, str],
    number: int,
    place: Tensor | None = None,
    begin: Callable[[int], None] = unseen,
) -> list[Image | str]:
    """Images ``number * _CHUNK`` and on, in their order: (3, H, W) uint8 each, or why one cannot be read.

    deadly: not to be read, and why.  place is not used: nobody knows how large the images are; they go through a pipe.
    """
    del place
    images: list[Image | str] = []
    for i in range(number * _CHUNK, min((number + 1) * _CHUNK, len(source))):
        begin(i)
        try:
            images.append(deadly.get(i) or read(source, i).numpy())
        except Unreadable as error:
            images.append(str(error))
    return images


def _memory(device: torch.device) -> int:
    """All of the device's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Crop:
    """Box, resize, flip, brightness and contrast of one view, of images in memory."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._cubic = spec.augment is not None and spec.augment.interpolation == "bicubic"

    def parameters(self, drawn: Draw | None, sides: Indices) -> Arrays:
        """What a call needs of a batch on its device: where each box starts and ends, (down, across), and flips."""
        box = views.boxes(self.spec, drawn, sides[:, 0], sides[:, 1])
        lines = np.zeros((3, 2, len(box)), dtype=np.float32)
        lines[:2] = box.T.reshape(2, 2, -1)
        if drawn is None:
            return {"lines": lines}
        lines[2, 1] = drawn.flip > 0
        return {"lines": lines, **jitter_parameters(drawn)}

    def __call__(
        self,
        drawn: Draw | None,
        images: Tensor,
        parameters: Mapping[str, npt.NDArray[Any]],
        sent: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """(N, 3, H, W) float32 in [0, 255] -> (N, size, size, 3).

        drawn: the samples' parameters, None for the evaluation view.  sent: ``parameters`` on the images' device; sent
        now where they are not given.  Each sample's crop is the same to the last bit whatever else is in its batch.
        """
        if sent is None:
            (sent,) = send([parameters], images.device)
        start, stop, _ = parameters["lines"]
        length = (stop - start).max(axis=0)
        out = images.new_empty((len(images), 3, self.spec.size, self.spec.size))
        for part in row_sums.parts(images, images[0].numel()):
            self._crop(drawn, part, images[part], float(length[part].max()), sent, out[part])
        return out.permute(0, 2, 3, 1)

    def _crop(
        self, drawn: Draw | None, part: slice, images: Tensor, longest: float, sent: Mapping[str, Tensor], out: Tensor
    ) -> None:
        """A part of the batch, whose rows in ``drawn`` and ``sent`` these are, into ``out``: (N, 3, size, size)."""
        index, weight = filters(sent["lines"][..., part], longest, self.spec.size, self._cubic)
        pixels = row_sums.filtered(images.mT, index[1], weight[1]).clamp_(0, 255)  # a cubic overshoots, each way
        torch.clamp(row_sums.filtered(pixels.mT, index[0], weight[0]), 0, 255, out=out)
        if drawn is not None:
            jitter(out, drawn, part, sent)


def filters(lines: Tensor, longest: float, size: int, cubic: bool) -> tuple[Tensor, Tensor]:
    """Which of a line's pixels start to stop - 1 count in each of ``size`` new ones, and with what shares.

    lines: (3, ...) float32: start, stop, and whether the new ones stand in the reverse order.  longest: of
    stop - start.  Returns (..., size, T) int64 in [start, stop) and (..., size, T) float32, with T for the longest
    line: shares beyond are 0.
    """
    radius, device = 2 if cubic else 1, lines.device
    terms = int(2 * radius * max(1.0, longest / size) + 0.75) + 1
    first, last, turned = lines[..., None].unbind(0)
    step = (last - first) / size
    place = torch.arange(size, device=device) + 0.5
    center = (first + torch.where(turned > 0, size - place, place) * step)[..., None]
    stretch = step.clamp(min=1)[..., None]
    pixel = (center - radius * stretch).floor() + torch.arange(terms, device=device) + 0.5
    x = (pixel - center).abs() / stretch
    weight = _keys(x) if cubic else (1 - x).clamp_(min=0)
    weight = weight * ((pixel > first[..., None]) & (pixel < last[..., None]))
    total = weight[..., 0]
    for term in weight.unbind(-1)[1:]:  # one after another, so that zeros, as many as the batch needs, change nothing
        total = total + term
    inside = torch.minimum(torch.maximum(pixel, first[..., None]), last[..., None] - 1)
    return inside.long(), weight / total[..., None]


def _keys(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
