"""The backend on torchvision: the baseline for parity tests, and the loader for platforms without DALI.

Torchvision's functional operations apply the parameters of ``views.draw`` to one sample at a time.  Worker processes
make whole batches (``workers``).  Hue is shifted in HSV, as in torchvision.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from sslx.data import retries, views
from sslx.data.backends import depth
from sslx.data.backends.color import LUMA, Finish
from sslx.data.backends.sensor import Sensor
from sslx.data.codecs import formats, levels
from sslx.data.codecs.formats import Levels
from sslx.data.codecs.headers import File, Unreadable
from sslx.data.facts import Channels
from sslx.data.planner import Planner
from sslx.data.sources.base import Coded, Pixels, Source
from sslx.data.transfer import Delivery, send
from sslx.data.views import Draw, ResizedView, ViewSpec
from sslx.data.waiting import WaitPolicy
from sslx.data.workers import AHEAD, Deadly, Pool, answer_alone, unseen

Indices = npt.NDArray[np.int64]


def images(source: Source, index: Indices, begin: Callable[[int], None] = unseen) -> Iterator[Tensor]:
    """Yield these images as (C, H, W) each, of the number and type of the source's channels, decoded by ``formats``.

    begin: called with each index before its image is read.  Raises Unreadable with the reason.  Torchvision's decoders
    are not used: version 0.29 deprecates them, and its PNG decoder ends the process by SIGSEGV at a damaged file.
    """
    if isinstance(source, Pixels):
        for i in index.tolist():
            begin(i)
            yield torch.from_numpy(source.read(i)).permute(2, 0, 1)
        return
    assert isinstance(source, Coded)
    begin(int(index[0]))  # before a reader reads the bytes of all images
    for i, file in zip(index.tolist(), source.files(index), strict=True):
        begin(i)
        yield retries.until_read(
            partial(decode, file, levels.of(source), source.facts.channels),
            partial(source.where, i),
            source.timeout_s,
            retries.is_of_storage,
        )


def decode(file: File, black_and_white: Levels, channels: Channels) -> Tensor:
    """Decode an image file to (C, H, W).  Raises Unreadable."""
    return torch.from_numpy(formats.read(file, black_and_white, channels)).permute(2, 0, 1)


def read(source: Source, index: int) -> Tensor:
    """Read one image as (C, H, W).  Raises Unreadable."""
    return next(images(source, np.array([index])))


def apply(spec: ViewSpec, image: Tensor, drawn: Draw | None, row: int) -> Tensor:
    """Make one view of one image: (C, H, W) -> (C, size, size) of the same type, without gain, noise, normalization.

    Images are RGB of 8 bits, or float32 from 0 to 1 of any channels (``depth.scaled``).
    The evaluation view may also be made of several images of one size at once: (N, C, H, W) -> (N, C, size, size).
    drawn: the parameters of a batch, None for the evaluation view.  row: the sample's row in them.
    """
    if isinstance(spec, ResizedView):
        return _resized(spec, image)
    height, width = image.shape[-2:]
    augment = spec.augment
    if drawn is None or augment is None:
        box = views.boxes(spec, None, [height], [width])[0]
        return _crop(spec, image, box, InterpolationMode.BILINEAR)
    sample = drawn.row(row)
    box = views.boxes(spec, sample, [height], [width])[0]
    bicubic = augment.interpolation == "bicubic"
    image = _crop(spec, image, box, InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR)
    is_flipped = bool(sample.flip[0])
    if augment.vertical_flip or augment.right_angles or augment.rotate:
        image, is_flipped = _turned(image, sample), False
    if (brightness := float(sample.brightness[0])) != 1:
        image = _brightness(image, brightness)
    if (contrast := float(sample.contrast[0])) != 1:
        image = _contrast(spec, image, contrast)
    if (saturation := float(sample.saturation[0])) != 1:
        image = functional.adjust_saturation(image, saturation)
    if (hue := float(sample.hue[0])) != 0:
        image = functional.adjust_hue(image, hue)
    if sample.gray[0]:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if sample.blur[0]:
        sigma, window = float(sample.sigma[0]), int(sample.window[0])
        image = functional.gaussian_blur(image, [window, window], [sigma, sigma])
    if sample.solarize[0]:
        image = functional.solarize(image, 128 / 255 if image.is_floating_point() else 128)
    return functional.horizontal_flip(image) if is_flipped else image


def _turned(image: Tensor, sample: Draw) -> Tensor:
    """Flip and rotate a square view (C, S, S) of one sample; the corners show it mirrored at its border."""
    if sample.flip[0]:
        image = functional.horizontal_flip(image)
    if sample.vertical_flip is not None and sample.vertical_flip[0]:
        image = functional.vertical_flip(image)
    if sample.quarter_turns is not None and (quarters := int(sample.quarter_turns[0])):
        image = torch.rot90(image, quarters, (1, 2))
    if sample.angle is not None and (angle := float(sample.angle[0])):
        side = image.shape[-1]
        reach = math.ceil((math.sqrt(2) - 1) / 2 * side) + 1  # from the border to a turned corner
        image = functional.pad(image, [reach], padding_mode="reflect")
        image = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        image = functional.center_crop(image, [side])
    return image


def _brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply all channels by a factor, as torchvision does for RGB and gray only."""
    return (image * factor).clamp_(0, 1) if image.is_floating_point() else functional.adjust_brightness(image, factor)


def _contrast(spec: ViewSpec, image: Tensor, factor: float) -> Tensor:
    """Blend an image with its mean gray or, if it is not RGB, with the mean of all its channels.

    Torchvision takes RGB and gray only, with a luma whose weights are rounded to four digits.
    """
    if not image.is_floating_point():
        return functional.adjust_contrast(image, factor)
    means = image.mean((1, 2), dtype=torch.float64)
    gray = float(means @ torch.from_numpy(LUMA)) if spec.channels.is_rgb else float(means.mean())
    return (image * factor + gray * (1 - factor)).clamp_(0, 1)


def prepared(spec: ViewSpec, image: Tensor) -> Tensor:
    """Make the evaluation view of an image that ``apply`` takes: (C, H, W) -> (C, size, size) float32, normalized."""
    white = 1 if image.is_floating_point() else 255
    scale, shift = (torch.tensor([white * x for x in values])[:, None, None] for values in (spec.std, spec.mean))
    return (apply(spec, image, None, 0).float() - shift) / scale


def _crop(spec: ViewSpec, image: Tensor, box: Indices, interpolation: InterpolationMode) -> Tensor:
    top, left, bottom, right = box.tolist()
    image = functional.resized_crop(
        image, top, left, bottom - top, right - left, [spec.size, spec.size], interpolation, antialias=True
    )
    return image.clamp_(0, 1) if image.is_floating_point() else image  # the cubic overshoots


def _resized(spec: ResizedView, images: Tensor) -> Tensor:
    """Make the views of images of one size, (..., 3, H, W), as other libraries do, of which most resize by PIL.

    Torch's own resizing of uint8 differs from PIL's by one level of gray in a few of a thousand pixels.  PIL does not
    resize RGB of more than 8 bits, so that torch does.
    """
    if images.ndim > 3:
        return torch.stack([_resized(spec, image) for image in images])
    height, width = images.shape[-2:]
    sides = [spec.resized, spec.resized]
    if spec.keeps_ratio:
        short = min(height, width)
        sides = [int(spec.resized * side / short) for side in (height, width)]
    if images.is_floating_point():
        name = spec.interpolation.upper().replace("NEAREST", "NEAREST_EXACT")  # which is PIL's
        interpolation = InterpolationMode[name]
        pixels = functional.resize(images, sides, interpolation, antialias=True).clamp_(0, 1)
    else:
        filter = Image.Resampling[spec.interpolation.upper()]
        image = Image.fromarray(images.permute(1, 2, 0).numpy())
        pixels = torch.from_numpy(np.array(image.resize((sides[1], sides[0]), filter))).permute(2, 0, 1)
    surplus = [(side - spec.size) / 2 for side in sides]
    top, left = (int(half) if spec.rounds_down else round(half) for half in surplus)
    return pixels[:, top : top + spec.size, left : left + spec.size]


def _make(source: Source, planner: Planner, t: int, place: Tensor, begin: Callable[[int], None]) -> None:
    """Write batch t to ``place``: one tensor (B, size, size, C) per view, of values up to 255."""
    work = planner(t)
    assert work is not None, "the order ends before this batch"
    channels, pictures = source.facts.channels, list(images(source, work.files, begin))
    if not channels.is_plain:
        pictures = [depth.scaled(image, channels, 1) for image in pictures]
    made = _views(planner.specs, channels, len(pictures), place)
    for spec, drawn, view in zip(planner.specs, work.draws, made, strict=True):
        for row, image in enumerate(pictures):
            one = apply(spec, image, drawn, row).permute(1, 2, 0)
            view[row] = one if channels.is_plain else one * 255


def _pixel_bytes(channels: Channels) -> int:
    """Return the bytes of a pixel of a view: RGB of 8 bits stays so, and all else is float32."""
    return 3 if channels.is_plain else 4 * channels.num


def _views(specs: Sequence[ViewSpec], channels: Channels, num_samples: int, place: Tensor) -> list[Tensor]:
    """Return each view's part of a batch's shared bytes as (num_samples, size, size, C), uint8 or float32."""
    sizes = [num_samples * spec.size**2 * _pixel_bytes(channels) for spec in specs]
    parts, dtype = place[: sum(sizes)].split(sizes), torch.uint8 if channels.is_plain else torch.float32
    return [
        part.view(dtype).view(num_samples, spec.size, spec.size, channels.num)
        for part, spec in zip(parts, specs, strict=True)
    ]


class TorchVision:
    """Batches of views, made by torchvision in ``num_threads`` worker processes, or in this process if it is 0.

    prefetch: the maximum number of batches that are made ahead of time, which may leave some of the processes out.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        device: torch.device,
        num_threads: int,
        wait_policy: WaitPolicy | None = None,
        prefetch: int | None = None,
    ) -> None:
        self.source, self.specs = source, tuple(specs)
        self.device, self.wait_policy = device, wait_policy or WaitPolicy()
        self.num_threads = num_threads if prefetch is None else min(num_threads, prefetch)
        self._ahead = AHEAD if prefetch is None or num_threads == 0 else prefetch // self.num_threads
        self._channels = source.facts.channels
        self._scale = [torch.tensor([255 * s for s in spec.std]) for spec in self.specs]
        self._shift = [torch.tensor([255 * m for m in spec.mean]) for spec in self.specs]
        self._normalizers = [Finish(spec, device) for spec in self.specs]
        self._sensors = [Sensor(spec, device) for spec in self.specs]

    def stream(self, planner: Planner, start: int) -> Iterator[Delivery]:
        """Yield batches start, start + 1, ..., with one (B, C, H, W) float32 channels_last tensor per view.

        Raises RuntimeError if a file of the batch cannot be decoded, which ends the stream, and what
        ``workers.Pool.results`` raises.
        """
        if (first := planner(start)) is None:
            return
        work = partial(_make, self.source, planner)
        numbers = takewhile(lambda t: planner(t) is not None, count(start))
        place_bytes = len(first.index) * sum(_pixel_bytes(self._channels) * spec.size**2 for spec in self.specs)
        if self.num_threads == 0:
            place = torch.empty(place_bytes, dtype=torch.uint8)
            for t in numbers:
                work(t, place, unseen)
                yield self._finish(planner, t, None, place)
            return
        pool = Pool(
            work,
            self.num_threads,
            place_bytes=place_bytes,
            wait_policy=self.wait_policy,
            name=self.source.where,
            ahead=self._ahead,
        )
        try:
            yield from pool.results(numbers, partial(self._finish, planner))
        finally:
            pool.close()

    def _finish(self, planner: Planner, t: int, _: Any, place: Tensor) -> Delivery:
        """Return the batch with normalized views on the device.  On a GPU ``Finish`` does this, as for all backends."""
        work = planner(t)
        assert work is not None
        views = _views(self.specs, self._channels, len(work.index), place)
        draws = work.draws if any(sensor.is_used for sensor in self._sensors) else [None] * len(views)
        parameters = [sensor.parameters(drawn) for sensor, drawn in zip(self._sensors, draws, strict=True)]
        groups = [{str(number): view for number, view in enumerate(views)}, work.along, *parameters]
        sent, extras, *sent_per_view = send(groups, self.device)
        inputs = zip(self._sensors, draws, sent.values(), sent_per_view, strict=True)
        seen = [sensor(drawn, view, parameters) for sensor, drawn, view, parameters in inputs]
        if self.device.type == "cuda":
            normalized = [finish(None, view) for finish, view in zip(self._normalizers, seen, strict=True)]
            extras = {name: tensor.clone() for name, tensor in extras.items()}  # a view would keep all pixels in memory
        else:
            normalized = [
                ((view.float() - m) / s).permute(0, 3, 1, 2)
                for view, m, s in zip(seen, self._shift, self._scale, strict=True)
            ]
        return Delivery(work.index, tuple(normalized), extras)

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Return the images that cannot be read and the reasons.  Uses a worker, because a file may end its reader."""
        if isinstance(self.source, Pixels) and self._channels.dtype != "float32":
            return {}
        if self.num_threads == 0:
            return _reasons(self.source, index, 0)
        work = partial(_reasons, self.source, index)
        pool = Pool(work, 1, place_bytes=0, wait_policy=self.wait_policy, name=self.source.where)
        try:
            return next(pool.results([0], answer_alone))
        except Deadly as error:
            return {error.index: str(error)}
        finally:
            pool.close()


def _reasons(
    source: Source, index: Indices, _: int, place: Tensor | None = None, begin: Callable[[int], None] = unseen
) -> dict[int, str]:
    """Return the result of ``unreadable``, as work for a pool."""
    del place
    reasons: dict[int, str] = {}
    for i in index:
        begin(int(i))
        try:
            read(source, int(i))
        except Unreadable as error:
            reasons[int(i)] = str(error)
    return reasons
