"""The same views on torchvision: the parity baseline, and the loader of platforms without DALI.

Each sample gets the parameters that ``views.draw`` makes for it, applied one by one with torchvision's own
functional operations.  Worker processes make whole batches; hue is shifted in HSV, as torchvision does.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

from sslx.data import color, levels, views
from sslx.data.headers import Unreadable
from sslx.data.order import Order
from sslx.data.sources import Source
from sslx.data.views import Draw, ViewSpec

Indices = npt.NDArray[np.int64]


def read(source: Source, index: int) -> Tensor:
    """Image ``index`` as (3, H, W) uint8 RGB, by the table of ``color``.

    Raises RuntimeError, with the reason, where the file cannot be read.  By PIL: torchvision 0.29 deprecates its own
    decoders, and its PNG decoder ends the process by SIGSEGV at a damaged file.
    """
    if source.pixels is not None:
        return torch.from_numpy(source.pixels[index]).permute(2, 0, 1)
    assert source.paths is not None
    return torch.from_numpy(color.read(source.paths[index], levels.of(source))).permute(2, 0, 1)


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


def _crop(spec: ViewSpec, image: Tensor, box: Indices, interpolation: InterpolationMode) -> Tensor:
    top, left, bottom, right = box.tolist()
    return functional.resized_crop(
        image, top, left, bottom - top, right - left, [spec.size, spec.size], interpolation, antialias=True
    )


class _Batches(Dataset[tuple[Tensor, ...]]):
    """Item t is batch t: one (B, H, W, 3) uint8 tensor a view."""

    def __init__(
        self,
        source: Source,
        specs: tuple[ViewSpec, ...],
        seed: int,
        order: Order,
        substitute: Callable[[Indices], Indices],
    ) -> None:
        self.source, self.specs, self.seed, self.order, self.substitute = (
            source,
            specs,
            seed,
            order,
            substitute,
        )

    def __getitem__(self, t: int) -> tuple[Tensor, ...]:
        index = self.order.batch(t)
        images = [read(self.source, int(i)) for i in self.substitute(index)]
        made: list[Tensor] = []
        for number, spec in enumerate(self.specs):
            drawn = None
            if spec.augment is not None:
                drawn = views.draw(spec, self.seed, self.order.epoch(t), index, number)
            rows = [apply(spec, image, drawn, row).permute(1, 2, 0) for row, image in enumerate(images)]
            made.append(torch.stack(rows))
        return tuple(made)


class _Numbers(torch.utils.data.Sampler[int]):
    """start, start + 1, ... until the order is finished."""

    def __init__(self, order: Order, start: int) -> None:
        self.order, self.start = order, start

    def __iter__(self) -> Iterator[int]:
        t = self.start
        while not self.order.finished(t):
            yield t
            t += 1


def one_thread(_: int) -> None:
    """What a worker process starts with."""
    torch.set_num_threads(1)


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
    ) -> None:
        self.source, self.specs, self.seed = source, tuple(specs), seed
        self.device, self.num_threads = device, num_threads

    def stream(
        self, order: Order, start: int, substitute: Callable[[Indices], Indices]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield batch start, start + 1, ...: one (B, 3, H, W) float32 channels_last tensor a view.

        Raises RuntimeError where a file of the batch cannot be decoded; the stream is then at its end.
        """
        loader = DataLoader(
            _Batches(self.source, self.specs, self.seed, order, substitute),
            batch_size=None,
            sampler=_Numbers(order, start),
            num_workers=self.num_threads,
            worker_init_fn=one_thread,
            pin_memory=self.device.type == "cuda",
        )
        scale = [torch.tensor([255 * s for s in spec.std]) for spec in self.specs]
        shift = [torch.tensor([255 * m for m in spec.mean]) for spec in self.specs]
        for batch in loader:
            yield tuple(
                ((view.to(self.device).float() - m.to(self.device)) / s.to(self.device)).permute(0, 3, 1, 2)
                for view, m, s in zip(batch, shift, scale, strict=True)
            )

    def unreadable(self, index: Indices) -> dict[int, str]:
        """Which of these images cannot be read, and why."""
        reasons: dict[int, str] = {}
        for i in index:
            try:
                read(self.source, int(i))
            except Unreadable as error:
                reasons[int(i)] = str(error)
        return reasons
