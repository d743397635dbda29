"""Data sets that fit into memory: decoded once, kept as uint8 on the views' device, cropped there in batches.

Nothing is read or decoded in training, so that a GPU needs no loader threads and no decoder beside it.  A crop and its
antialiased resize are linear in the pixels, down and across: two batched products with each sample's own filters, which
are zero outside of its box, so that images of several sizes stand in one padded tensor.  The filters are those of PIL
and torchvision: a triangle, or Keys' cubic (IEEE TASSP 29, 1981) with a = -0.5, stretched where a crop is shrunk.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sslx import distributed
from sslx.data import views
from sslx.data.finish import finish
from sslx.data.order import Order
from sslx.data.sources import Source
from sslx.data.torchvision import one_thread, read
from sslx.data.views import Draw, ViewSpec
from sslx.errors import ConfigError

Indices = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
_SAY_EVERY_S = 3.0
_SHARE = 0.5  # of the memory
_CHUNK = 32  # images that a worker hands over at once
_LUMA = (0.299, 0.587, 0.114)


class Resident:
    """Batches of views, made from images in memory.

    specs: one per view.  device: of the images and the views.  num_threads: processes that decode, at the start.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        seed: int,
        device: torch.device,
        num_threads: int,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.source, self.specs, self.seed = source, tuple(specs), seed
        self.device, self.num_threads, self.say = device, num_threads, say
        self._bad = np.zeros(len(source), dtype=bool)
        self._sides = np.zeros((len(source), 2), dtype=np.int64)
        self._pixels: Tensor | None = None

    def stream(
        self, order: Order, start: int, substitute: Callable[[Indices], Indices]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batch start, start + 1, ...: one (B, 3, H, W) float32 channels_last tensor a view.

        Raises RuntimeError where a file of the batch could not be decoded; the stream is then at its end.
        """
        t = start
        while not order.finished(t):
            index = order.batch(t)
            files = substitute(index)
            pixels = self._images()
            if self._bad[files].any():
                raise RuntimeError("an unreadable image")
            images = pixels[torch.from_numpy(files).to(self.device, non_blocking=True)].float()
            made: list[Tensor] = []
            for number, spec in enumerate(self.specs):
                drawn = None
                if spec.augment is not None:
                    drawn = views.draw(spec, self.seed, order.epoch(t), index, number)
                made.append(finish(spec, drawn, crop(spec, drawn, images, self._sides[files])))
            yield tuple(made)
            t += 1

    def readable(self, index: Indices) -> bool:
        """Whether all these files could be decoded."""
        self._images()
        return not self._bad[index].any()

    def _images(self) -> Tensor:
        """(N, 3, H, W) uint8 on the device; decoded at the first call, each in the upper left corner of its place."""
        if self._pixels is None:
            decoded = self._decode()
            shape = (len(decoded), 3, *self._sides.max(axis=0).tolist())
            everyone = torch.zeros(shape, dtype=torch.uint8)
            for i, image in enumerate(decoded):
                if image is not None:
                    everyone[i, :, : image.shape[1], : image.shape[2]] = image
                decoded[i] = None
            self._pixels = everyone.to(self.device)
        return self._pixels

    def _decode(self) -> list[Tensor | None]:
        """Every image, None where it cannot be read.  ConfigError where all together are too many.

        By processes: of 32 px JPEGs, two threads decode fewer in a second than one does (Python's lock).
        """
        count = len(self.source)
        host = _memory(torch.device("cpu")) / 2 / distributed.local_world_size()  # decoded, and put together
        most = _SHARE * min(_memory(self.device), host)
        decoded: list[Tensor | None] = []
        largest, said = np.zeros(2, dtype=np.int64), time.monotonic()
        loader = DataLoader(
            _Chunks(self.source),
            batch_size=None,
            num_workers=0 if self.source.pixels is not None else self.num_threads,
            collate_fn=_as_it_is,
            worker_init_fn=one_thread,
        )
        for chunk in loader:
            for image in chunk:
                i = len(decoded)
                self._bad[i] = image is None
                self._sides[i] = (0, 0) if image is None else image.shape[1:]
                largest = np.maximum(largest, self._sides[i])
                decoded.append(None if image is None else torch.from_numpy(image))
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


class _Chunks(torch.utils.data.Dataset[list[Pixels | None]]):
    """The images in their order, _CHUNK at a time: (3, H, W) uint8 each, None where one cannot be read.

    Arrays, which go through a pipe: tensors would take shared memory, of which containers have 64 MB.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // _CHUNK)

    def __getitem__(self, number: int) -> list[Pixels | None]:
        start = number * _CHUNK
        return [self._one(i) for i in range(start, min(start + _CHUNK, len(self.source)))]

    def _one(self, index: int) -> Pixels | None:
        try:
            return read(self.source, index).numpy()
        except RuntimeError:
            return None


def _as_it_is(chunk: list[Pixels | None]) -> list[Pixels | None]:
    return chunk


def _memory(device: torch.device) -> int:
    """All of the device's, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def crop(spec: ViewSpec, drawn: Draw | None, images: Tensor, sides: Indices) -> Tensor:
    """(N, 3, H, W) float32 in [0, 255] -> (N, size, size, 3): box, resize, flip, brightness and contrast.

    drawn: the samples' parameters, None for the evaluation view.  sides: (N, 2) height and width of each image.
    """
    top, left, bottom, right = views.boxes(spec, drawn, sides[:, 0], sides[:, 1]).T
    cubic = spec.augment is not None and drawn is not None and spec.augment.interpolation == "bicubic"
    rows = filters(top, bottom, images.shape[2], spec.size, cubic, images.device)
    columns = filters(left, right, images.shape[3], spec.size, cubic, images.device)
    if drawn is not None and drawn.flip.any():
        columns = torch.where(_column(drawn.flip > 0, images), columns.flip(1), columns)
    pixels = images @ columns[:, None].mT
    if cubic:
        pixels = pixels.clamp_(0, 255)  # it overshoots, each way
    pixels = rows[:, None] @ pixels
    if cubic:
        pixels = pixels.clamp_(0, 255)
    if drawn is not None and (drawn.brightness != 1).any():
        pixels = (pixels * _column(drawn.brightness, images)[..., None]).clamp_(0, 255)
    if drawn is not None and (drawn.contrast != 1).any():
        red, green, blue = pixels.mean((2, 3)).unbind(1)
        gray = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None, None, None]
        pixels = gray.lerp(pixels, _column(drawn.contrast, images)[..., None]).clamp_(0, 255)
    return pixels.permute(0, 2, 3, 1).contiguous()


def filters(start: Indices, stop: Indices, side: int, size: int, cubic: bool, device: torch.device) -> Tensor:
    """(N, size, side) float32: the shares of a line's pixels start to stop - 1 in each of ``size`` new ones."""
    ends = torch.from_numpy(np.stack([start, stop]).astype(np.float32)).to(device, non_blocking=True)
    first, last = ends[0, :, None, None], ends[1, :, None, None]
    step = (last - first) / size
    center = first + (torch.arange(size, device=device)[:, None] + 0.5) * step
    pixel = torch.arange(side, device=device) + 0.5
    x = (pixel - center).abs() / step.clamp(min=1)
    weight = _keys(x) if cubic else (1 - x).clamp_(min=0)
    weight = weight * ((pixel > first) & (pixel < last))
    return weight / weight.sum(2, keepdim=True)


def _keys(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _column(values: npt.NDArray[np.generic], like: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1) on a device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, non_blocking=True)[:, None, None]
