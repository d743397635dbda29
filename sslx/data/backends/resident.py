"""The backend for data sets that fit into memory: decoded once, kept so on the device, cropped there in batches.

Training reads and decodes nothing, so that a GPU needs neither loader threads nor a decoder.  A crop and its
antialiased resize are linear in the pixels, vertically and horizontally: sums of rows with each sample's own filters,
which are zero outside its box, so that images of several sizes fit in one padded tensor.  The filters are those of PIL
and torchvision: a triangle, or Keys' cubic (IEEE TASSP 29, 1981) with a = -0.5, stretched if a crop is shrunk.
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
from sslx.data.backends import depth, row_sums, turns
from sslx.data.backends.color import Finish, jitter, jitter_parameters
from sslx.data.backends.torchvision import read
from sslx.data.codecs.headers import Unreadable
from sslx.data.planner import Planner, Work
from sslx.data.sources import Pixels, Source
from sslx.data.transfer import Arrays, Delivery, Staged, send, stage
from sslx.data.views import Draw, ViewSpec
from sslx.data.waiting import WaitPolicy
from sslx.data.workers import Deadly, Pool, answer_alone, unseen
from sslx.errors import ConfigError

Indices = npt.NDArray[np.int64]
Image = npt.NDArray[Any]
_MESSAGE_EVERY_S = 3.0
_MAX_MEMORY_FRACTION = 0.5
_CHUNK = 32  # number of images in a worker's result


@dataclass(frozen=True)
class Prepared:
    """A batch's inputs from the host.  cropping: each view's arrays for ``Crop``.  staged: all inputs of the device."""

    work: Work
    cropping: list[Arrays]
    staged: Staged


class Resident:
    """Batches of views, made from images in memory.

    specs: one per view.  device: the images' and views' device.  num_threads: processes that decode at the start.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        device: torch.device,
        num_threads: int,
        say: Callable[[str], None] = lambda _: None,
        wait_policy: WaitPolicy | None = None,
    ) -> None:
        self.source, self.specs = source, tuple(specs)
        self.device, self.num_threads, self.say = device, num_threads, say
        self.wait_policy = wait_policy or WaitPolicy()
        self._steps = [(Crop(spec), Finish(spec, device)) for spec in self.specs]
        self._deadly: dict[int, str] = {}
        self._reasons: dict[int, str] = {}
        self._sides = np.zeros((len(source), 2), dtype=np.int64)
        self._pixels: Tensor | None = None

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batches start, start + 1, ..., with one (B, C, H, W) float32 channels_last tensor per view.

        Raises RuntimeError if a file of the batch could not be decoded, which ends the stream.
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
        """Make a batch's inputs on the host, once the images are decoded."""
        sides = self._sides[work.files]
        cropping = [crop.parameters(drawn, sides) for drawn, (crop, _) in zip(work.draws, self._steps, strict=True)]
        finishing = [finish.parameters(drawn) for drawn, (_, finish) in zip(work.draws, self._steps, strict=True)]
        parameters = [{**crop, **finish} for crop, finish in zip(cropping, finishing, strict=True)]
        return Prepared(work, cropping, stage([{"files": work.files}, work.along, *parameters], self.device))

    def _make(self, pixels: Tensor, batch: "Prepared") -> Delivery:
        """Make a batch from the images in memory."""
        chosen, extras, *sent_per_view = batch.staged.send()
        images = depth.chosen(pixels, chosen["files"], self.source.facts.channels)
        views = [
            finish(drawn, crop(drawn, images, parameters, sent), sent)
            for drawn, (crop, finish), parameters, sent in zip(
                batch.work.draws, self._steps, batch.cropping, sent_per_view, strict=True
            )
        ]
        return Delivery(batch.work.index, tuple(views), extras)

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Return the images that could not be decoded and the reasons."""
        self._images()
        return {int(i): self._reasons[int(i)] for i in index if int(i) in self._reasons}

    def _images(self) -> Tensor:
        """Return all images, decoded at the first call: (N, C, H, W) on the device, padded right and below.

        They have the type of the source's pixels, so that 16 bits stay 16 bits.
        """
        if self._pixels is None:
            decoded: list[Tensor | None] = []
            while not decoded:
                try:
                    with activity.doing("decoding the images into memory"):
                        decoded = self._decode()
                except Deadly as error:
                    self._deadly[error.index] = str(error)
            channels = self.source.facts.channels
            shape = (len(decoded), channels.num, *self._sides.max(axis=0).tolist())
            padded = torch.zeros(shape, dtype=getattr(torch, channels.dtype))
            for i, image in enumerate(decoded):
                if image is not None:
                    padded[i, :, : image.shape[1], : image.shape[2]] = image
                decoded[i] = None
            self._pixels = padded.to(self.device)
        return self._pixels

    def _chunks(self) -> Iterator[list[Image | str]]:
        numbers = range(-(-len(self.source) // _CHUNK))
        work = partial(_read_chunk, self.source, self._deadly)
        if self.num_threads == 0 or isinstance(self.source, Pixels):
            yield from map(work, numbers)
            return
        workers = min(self.num_threads, len(numbers))
        pool = Pool(work, workers, place_bytes=0, wait_policy=self.wait_policy, name=self.source.where)
        try:
            yield from pool.results(numbers, answer_alone)
        finally:
            pool.close()

    def _decode(self) -> list[Tensor | None]:
        """Return every image, with None for unreadable images.  Raises ConfigError if they do not fit into memory.

        Processes decode the images: because of Python's lock, two threads decode 32 px JPEGs slower than one.
        """
        count = len(self.source)
        # The host holds every image twice while they are put together.
        host_bytes = _memory_bytes(torch.device("cpu")) / 2 / distributed.local_world_size()
        max_bytes = _MAX_MEMORY_FRACTION * min(_memory_bytes(self.device), host_bytes)
        channels = self.source.facts.channels
        bytes_per_pixel = channels.num * np.dtype(channels.dtype).itemsize
        decoded: list[Tensor | None] = []
        largest, last_message = np.zeros(2, dtype=np.int64), time.monotonic()
        for chunk in self._chunks():
            self.wait_policy.check_stop()
            for image in chunk:
                i = len(decoded)
                if isinstance(image, str):
                    self._reasons[i] = image
                    decoded.append(None)
                    continue
                self._sides[i] = image.shape[1:]
                largest = np.maximum(largest, self._sides[i])
                decoded.append(torch.from_numpy(image))
            num_bytes = bytes_per_pixel * count * int(largest.prod())
            if num_bytes > max_bytes:
                raise ConfigError(
                    f"{count:,} images of up to {'x'.join(map(str, largest))} px would take "
                    f"{num_bytes / 2**30:.1f} GiB, more than half of the memory: take --data.backend auto"
                )
            if time.monotonic() - last_message > _MESSAGE_EVERY_S:
                self.say(f"decoded {len(decoded):,} of {count:,} images into memory")
                last_message = time.monotonic()
        return decoded


def _read_chunk(
    source: Source,
    deadly: dict[int, str],
    number: int,
    place: Tensor | None = None,
    begin: Callable[[int], None] = unseen,
) -> list[Image | str]:
    """Return ``_CHUNK`` images from ``number * _CHUNK`` on: (C, H, W) each, or why an image cannot be read.

    deadly: images that must not be read, and why.  place is not used, because the images' sizes are not known ahead;
    they go through a pipe.
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


def _memory_bytes(device: torch.device) -> int:
    """Return the device's total memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Crop:
    """Box, resize, flips, brightness and contrast of one view of images in memory."""

    def __init__(self, spec: ViewSpec) -> None:
        self.spec = spec
        self._cubic = spec.augment is not None and spec.augment.interpolation == "bicubic"

    def parameters(self, drawn: Draw | None, sides: Indices) -> Arrays:
        """Return the arrays that a call needs on its device: each box's start and end (y, x), flips, and jitter."""
        box = views.boxes(self.spec, drawn, sides[:, 0], sides[:, 1])
        lines = np.zeros((3, 2, len(box)), dtype=np.float32)
        lines[:2] = box.T.reshape(2, 2, -1)
        if drawn is None:
            return {"lines": lines}
        lines[2] = turns.reversed_axes(drawn)
        return {"lines": lines, **jitter_parameters(drawn)}

    def __call__(
        self,
        drawn: Draw | None,
        images: Tensor,
        parameters: Mapping[str, npt.NDArray[Any]],
        sent: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Crop and resize images: (N, C, H, W) float32 in [0, 255] -> (N, size, size, C).

        drawn: the samples' parameters, None for the evaluation view.  sent: ``parameters`` on the images' device; by
        default they are sent now.  Each sample's crop is the same to the last bit in any batch.
        """
        if sent is None:
            (sent,) = send([parameters], images.device)
        start, stop, _ = parameters["lines"]
        length = (stop - start).max(axis=0)
        out = images.new_empty((*images.shape[:2], self.spec.size, self.spec.size))
        for part in row_sums.parts(images, images[0].numel()):
            self._crop(drawn, part, images[part], float(length[part].max()), sent, out[part])
        return out.permute(0, 2, 3, 1)

    def _crop(
        self, drawn: Draw | None, part: slice, images: Tensor, longest: float, sent: Mapping[str, Tensor], out: Tensor
    ) -> None:
        """Write a part of the batch to ``out``, (N, C, size, size).  part: its rows in ``drawn`` and ``sent``."""
        index, weight = filters(sent["lines"][..., part], longest, self.spec.size, self._cubic)
        pixels = row_sums.filtered(images.mT, index[1], weight[1]).clamp_(0, 255)  # the cubic overshoots
        torch.clamp(row_sums.filtered(pixels.mT, index[0], weight[0]), 0, 255, out=out)
        if drawn is not None and not turns.delays_jitter(self.spec):
            jitter(out, drawn, part, sent, is_rgb=self.spec.channels.is_rgb)


def filters(lines: Tensor, longest: float, size: int, cubic: bool) -> tuple[Tensor, Tensor]:
    """Return the filters that resize the pixels start to stop - 1 of a line to ``size`` new pixels.

    lines: (3, ...) float32, start, stop, and whether to reverse the new pixels.  longest: the maximum of stop - start.
    Returns the input pixels of each new pixel, (..., size, T) int64 in [start, stop), and their weights, (..., size, T)
    float32.  T suits the longest line; surplus weights are 0.
    """
    radius, device = 2 if cubic else 1, lines.device
    terms = int(2 * radius * max(1.0, longest / size) + 0.75) + 1
    first, last, is_reversed = lines[..., None].unbind(0)
    step = (last - first) / size
    place = torch.arange(size, device=device) + 0.5
    center = (first + torch.where(is_reversed > 0, size - place, place) * step)[..., None]
    stretch = step.clamp(min=1)[..., None]
    pixel = (center - radius * stretch).floor() + torch.arange(terms, device=device) + 0.5
    x = (pixel - center).abs() / stretch
    weight = _keys(x) if cubic else (1 - x).clamp_(min=0)
    weight = weight * ((pixel > first[..., None]) & (pixel < last[..., None]))
    total = weight[..., 0]
    for term in weight.unbind(-1)[
        1:
    ]:  # in sequence, so that the number of trailing zeros, which depends on the batch, changes nothing
        total = total + term
    inside = torch.minimum(torch.maximum(pixel, first[..., None]), last[..., None] - 1)
    return inside.long(), weight / total[..., None]


def _keys(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
