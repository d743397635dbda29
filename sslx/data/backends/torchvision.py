"""The same views on torchvision: the parity baseline, and the loader of platforms without DALI.

Each sample gets the parameters that ``views.draw`` makes for it, applied one by one with torchvision's own
functional operations.  Worker processes make whole batches (``workers``); hue is shifted in HSV, as torchvision does.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from sslx.data import views
from sslx.data.backends.color import Finish
from sslx.data.codecs import formats, levels
from sslx.data.codecs.headers import Unreadable
from sslx.data.order import Order
from sslx.data.patience import Patience
from sslx.data.sources import Source
from sslx.data.transfer import Along, Made, nothing, send
from sslx.data.views import Draw, ViewSpec
from sslx.data.workers import Deadly, Pool, answer_alone, unseen

Indices = npt.NDArray[np.int64]


def read(source: Source, index: int) -> Tensor:
    """Image ``index`` as (3, H, W) uint8 RGB, by the table of ``formats``.

    Raises RuntimeError, with the reason, where the file cannot be read.  By PIL: torchvision 0.29 deprecates its own
    decoders, and its PNG decoder ends the process by SIGSEGV at a damaged file.
    """
    if source.pixels is not None:
        return torch.from_numpy(source.pixels[index]).permute(2, 0, 1)
    assert source.paths is not None
    return torch.from_numpy(formats.read(source.paths[index], levels.of(source))).permute(2, 0, 1)


def apply(spec: ViewSpec, image: Tensor, drawn: Draw | None, row: int) -> Tensor:
    """One view of one image: (3, H, W) uint8 -> (3, size, size) uint8, not yet normalised.

    drawn, row: the parameters of the sample; None for the evaluation view.
    """
    height, width = image.shape[-2:]
    augment = spec.augment
    if drawn is None or augment is None:
        box = views.boxes(spec, None, [height], [width])[0]
        return _crop(spec, image, box, InterpolationMode.BILINEAR)
    one = Draw(**{name: value[row : row + 1] for name, value in vars(drawn).items()})
    box = views.boxes(spec, one, [height], [width])[0]
    bicubic = augment.interpolation == "bicubic"
    image = _crop(spec, image, box, InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR)
    if (brightness := float(one.brightness[0])) != 1:
        image = functional.adjust_brightness(image, brightness)
    if (contrast := float(one.contrast[0])) != 1:
        image = functional.adjust_contrast(image, contrast)
    if (saturation := float(one.saturation[0])) != 1:
        image = functional.adjust_saturation(image, saturation)
    if (hue := float(one.hue[0])) != 0:
        image = functional.adjust_hue(image, hue)
    if one.gray[0]:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if one.blur[0]:
        sigma, window = float(one.sigma[0]), int(one.window[0])
        image = functional.gaussian_blur(image, [window, window], [sigma, sigma])
    if one.solarize[0]:
        image = functional.solarize(image, 128)
    return functional.horizontal_flip(image) if one.flip[0] else image


def prepared(spec: ViewSpec, image: Tensor) -> Tensor:
    """One image as the evaluation view: (3, H, W) uint8 -> (3, size, size) float32, normalized, as the loader's."""
    scale, shift = (torch.tensor([255 * value for value in values])[:, None, None] for values in (spec.std, spec.mean))
    return (apply(spec, image, None, 0).float() - shift) / scale


def _crop(spec: ViewSpec, image: Tensor, box: Indices, interpolation: InterpolationMode) -> Tensor:
    top, left, bottom, right = box.tolist()
    return functional.resized_crop(
        image, top, left, bottom - top, right - left, [spec.size, spec.size], interpolation, antialias=True
    )


def _make(
    source: Source,
    specs: tuple[ViewSpec, ...],
    seed: int,
    order: Order,
    substitute: Callable[[Indices], Indices],
    t: int,
    place: Tensor,
    begin: Callable[[int], None],
) -> None:
    """Batch t into ``place``: one (B, size, size, 3) uint8 tensor a view."""
    index = order.batch(t)
    images: list[Tensor] = []
    for i in substitute(index):
        begin(int(i))
        images.append(read(source, int(i)))
    drawn_of_views = views.draws(specs, seed, order.epoch(t), index)
    for spec, drawn, view in zip(specs, drawn_of_views, _views(specs, len(index), place), strict=True):
        for row, image in enumerate(images):
            view[row] = apply(spec, image, drawn, row).permute(1, 2, 0)


def _views(specs: Sequence[ViewSpec], num_samples: int, place: Tensor) -> list[Tensor]:
    """Where each view of a batch lies in its bytes: (num_samples, size, size, 3) uint8 each, which share them."""
    sizes = [num_samples * spec.size**2 * 3 for spec in specs]
    parts = place[: sum(sizes)].split(sizes)
    return [part.view(num_samples, spec.size, spec.size, 3) for part, spec in zip(parts, specs, strict=True)]


class TorchVision:
    """Batches of views, made by torchvision in ``num_threads`` worker processes (0: in this one)."""

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        seed: int,
        device: torch.device,
        num_threads: int,
        patience: Patience | None = None,
    ) -> None:
        self.source, self.specs, self.seed = source, tuple(specs), seed
        self.device, self.num_threads, self.patience = device, num_threads, patience or Patience()
        self._scale = [torch.tensor([255 * s for s in spec.std]) for spec in self.specs]
        self._shift = [torch.tensor([255 * m for m in spec.mean]) for spec in self.specs]
        self._normalized = [Finish(spec, device) for spec in self.specs]

    def stream(
        self, order: Order, start: int, substitute: Callable[[Indices], Indices], along: Along = nothing
    ) -> Iterator[Made]:
        """Yield batch start, start + 1, ...: one (B, 3, H, W) float32 channels_last tensor a view; what came along.

        Raises RuntimeError where a file of the batch cannot be decoded; the stream is then at its end.  Also what
        ``workers.Pool.results`` raises.
        """
        if order.finished(start):
            return
        work = partial(_make, self.source, self.specs, self.seed, order, substitute)
        numbers = takewhile(lambda t: not order.finished(t), count(start))
        place_bytes = len(order.batch(start)) * sum(3 * spec.size**2 for spec in self.specs)
        if self.num_threads == 0:
            place = torch.empty(place_bytes, dtype=torch.uint8)
            for t in numbers:
                work(t, place, unseen)
                yield self._finish(order, along, t, None, place)
            return
        pool = Pool(work, self.num_threads, place_bytes=place_bytes, patience=self.patience, name=self.source.where)
        try:
            yield from pool.results(numbers, partial(self._finish, order, along))
        finally:
            pool.close()

    def _finish(self, order: Order, along: Along, t: int, _: Any, place: Tensor) -> Made:
        """The batch's views on the device, normalised: on a GPU by the operations that all backends end with."""
        made = _views(self.specs, len(order.batch(t)), place)
        sent, came = send([{str(number): view for number, view in enumerate(made)}, along(t)], self.device)
        if self.device.type == "cuda":
            finished = [finish(None, view) for finish, view in zip(self._normalized, sent.values(), strict=True)]
            came = {name: tensor.clone() for name, tensor in came.items()}  # or the pixels would live as long as they
        else:
            finished = [
                ((view.float() - m) / s).permute(0, 3, 1, 2)
                for view, m, s in zip(sent.values(), self._shift, self._scale, strict=True)
            ]
        return tuple(finished), came

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why; by a worker where there are any: a file may end its reader."""
        if self.num_threads == 0:
            return _reasons(self.source, index, 0)
        work = partial(_reasons, self.source, index)
        pool = Pool(work, 1, place_bytes=0, patience=self.patience, name=self.source.where)
        try:
            return next(pool.results([0], answer_alone))
        except Deadly as error:
            return {error.index: str(error)}
        finally:
            pool.close()


def _reasons(
    source: Source, index: Indices, _: int, place: Tensor | None = None, begin: Callable[[int], None] = unseen
) -> dict[int, str]:
    """What ``unreadable`` returns, as work for a pool."""
    del place
    reasons: dict[int, str] = {}
    for i in index:
        begin(int(i))
        try:
            read(source, int(i))
        except Unreadable as error:
            reasons[int(i)] = str(error)
    return reasons
