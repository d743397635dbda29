"""ViewSpec: a declarative augmentation recipe, and the parameters drawn for it.

A view is one augmented crop of an image.  The spec gives probabilities and strengths; ``draw`` turns (seed, epoch,
sample, view) into one row of parameters; the backends only apply them.  Therefore all backends make the same view of
the same sample, and none of them holds random state.

The operations and their order are SimCLR's (arXiv 2002.05709, appendix A): random resized crop, flip, color
jitter, grayscale, blur, then BYOL's solarize (2006.07733, appendix B), then normalization.  One deviation: the four
parts of the jitter run in the fixed order brightness, contrast, saturation, hue.  The blur's window is as wide
as its sigma needs (3 sigma each way, 99.7 % of the weight), at most the paper's tenth of the view.

The operations for any number of channels (``any_channels``) have these places, for which no paper gives an order.  The
geometry stays together and comes first, as the crop does in SimCLR: crop, horizontal flip, vertical flip, rotation by a
right angle, rotation by any angle.  The gain per channel comes after all operations that mix channels or compare them
with a threshold (grayscale, solarize), which it would change otherwise.  Noise is last before normalization, so that
no rotation or blur smooths it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data import any_channels
from sslx.data.augment import Augment as Augment
from sslx.data.facts import RGB, Channels
from sslx.data.text import TextSpec
from sslx.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIDE = 1 << 15
"""Of a view, in pixels."""
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""The names of PIL's filters, by its numbers."""
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0  # of the blur, in pixels
_NUM_BOXES = 10  # candidate crop boxes, of which the first one that fits the image is taken, as in torchvision
_NUM_DRAWS = 2 * _NUM_BOXES + 12  # random numbers per view of a sample
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view of size x size pixels, augmented by ``augment`` or, with ``augment=None``, the image's center.

    center: side of the central square, as a fraction of the image's shorter side (evaluation only).
    mean, std: per channel, for the normalization, of values from 0 (black) to 1 (white).
    channels: those of the images that the view is for.
    """

    size: int
    augment: Augment | None = None
    center: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: Channels = RGB


@dataclass(frozen=True, kw_only=True)
class ResizedView(ViewSpec):
    """The evaluation view of other libraries: PIL resizes the image, and then its center is cut out.

    resized: the shorter side in pixels after resizing, before the center of ``size`` pixels is cut out.
    keeps_ratio: False if the whole image becomes a square of ``resized`` pixels, whatever its shape.
    interpolation: the filter, one of ``FILTERS``.
    rounds_down: whether the place of the center is rounded down, as in transformers, or to the nearest pixel, of two
      equally near ones to the even one, as in torchvision.
    """

    resized: int
    keeps_ratio: bool = True
    interpolation: str = "bilinear"
    rounds_down: bool = False

    def __post_init__(self) -> None:
        if self.resized < self.size or self.augment is not None or self.center != 1:
            raise ValueError(f"expected an evaluation view that is resized to {self.size} pixels or more, got {self}")
        if self.interpolation not in FILTERS.values():
            raise ValueError(f"expected a filter among {', '.join(FILTERS.values())}, got {self.interpolation}")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a method needs of each sample: views, in the order of ``Batch.views``, and a text for ``Batch.text``."""

    views: tuple[ViewSpec, ...]
    text: TextSpec | None = None


def eval_view(
    size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    channels: Channels = RGB,
) -> ViewSpec:
    """Return the probes' view of both splits: the whole shorter side up to 64 px, the usual central 224/256 above."""
    return ViewSpec(size=size, center=1.0 if size <= 64 else 0.875, mean=mean, std=std, channels=channels)


def for_images(specs: Sequence[ViewSpec], like: ViewSpec) -> tuple[ViewSpec, ...]:
    """Return the views for images with the channels, mean and standard deviation of the view ``like``.

    Those for RGB of 8 bits that are normalized as usual are returned as they are.  Raises ConfigError, which names the
    flags to set, if an augmentation has no meaning for these channels.
    """
    channels = like.channels
    if channels.is_plain and (like.mean, like.std) == (IMAGENET_MEAN, IMAGENET_STD):
        return tuple(specs)
    if not channels.is_rgb:
        used = {name: None for spec in specs if spec.augment for name in _color_operations(spec.augment)}
        if used:
            flags = " ".join(f"--augment.{name} 0" for name in used)
            raise ConfigError(
                f"{', '.join(used)} of an augmentation need RGB images, and these have {channels.in_words}: add {flags}"
            )
    return tuple(replace(spec, mean=like.mean, std=like.std, channels=channels) for spec in specs)


def _color_operations(augment: Augment) -> list[str]:
    """Return the names of the operations of an augmentation that only have a meaning for RGB."""
    names = [name for name in ("saturation", "hue") if augment.jitter and getattr(augment, name)]
    return [*names, *(["gray"] if augment.gray else [])]


def from_json(settings: Mapping[str, Any]) -> ViewSpec:
    """Return the evaluation view that ``dataclasses.asdict`` and JSON made this of.

    Raises TypeError or ValueError for anything else.
    """
    lists = {name: tuple(cast("list[Any]", value)) for name, value in settings.items() if isinstance(value, list)}
    values: dict[str, Any] = {**settings, **lists}
    if "channels" in values:
        values["channels"] = Channels(**values["channels"])
    view = ResizedView(**values) if "resized" in values else ViewSpec(**values)
    numbers, num = (*view.mean, *view.std, view.center), view.channels.num
    if {len(view.mean), len(view.std)} != {num} or not all(map(math.isfinite, numbers)) or min(view.std) <= 0:
        raise ValueError(
            f"expected a mean and a standard deviation of each of {num} channels, got {view.mean} and {view.std}"
        )
    sides: list[Any] = [view.size, view.resized if isinstance(view, ResizedView) else view.size]
    if not all(isinstance(side, int) and 0 < side < MAX_SIDE for side in sides) or not 0 < view.center <= 1:
        raise ValueError(f"expected a side in pixels and a fraction of it, got {view.size} and {view.center}")
    return view


@dataclass(frozen=True)
class Draw:
    """The parameters of one view of N samples; every array is float32 with N rows.

    area, ratio: (N, 10) candidate boxes, as fractions of the area and as width/height.  place: (N, 2) position of the
    box in [0, 1), (y, x).  flip, gray, blur, solarize: (N,) 0 or 1.  brightness, contrast, saturation: (N,) factors; 1
    changes nothing.  hue: (N,) turns of the color circle.  sigma, window: (N,) pixels; windows are odd.

    What ``any_channels`` draws is None where the recipe never uses the operation.  vertical_flip: (N,) 0 or 1.
    quarter_turns: (N,) 0 to 3, counterclockwise.  angle: (N,) degrees counterclockwise.  gain: (N, C) factors.
    noise: (N,) standard deviations as fractions of full scale.  noise_key: (N, 2) int64, two words < 2^32 of which the
    noise of every pixel is a function.
    """

    area: FloatArray
    ratio: FloatArray
    place: FloatArray
    flip: FloatArray
    brightness: FloatArray
    contrast: FloatArray
    saturation: FloatArray
    hue: FloatArray
    gray: FloatArray
    blur: FloatArray
    sigma: FloatArray
    window: FloatArray
    solarize: FloatArray
    vertical_flip: FloatArray | None = None
    quarter_turns: FloatArray | None = None
    angle: FloatArray | None = None
    gain: FloatArray | None = None
    noise: FloatArray | None = None
    noise_key: npt.NDArray[np.int64] | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of all operations that the recipe uses, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def row(self, number: int) -> "Draw":
        """Return the parameters of one sample, as a batch of one."""
        return Draw(**{name: array[number : number + 1] for name, array in self.arrays().items()})


def widest_window(spec: ViewSpec) -> int:
    """Return the widest possible blur window in pixels: 3 sigma each way, at most about a tenth of the view."""
    return 2 * min(math.ceil(3 * MAX_SIGMA), max(1, spec.size // 20)) + 1


def draw(spec: ViewSpec, seed: int, epoch: int, index: npt.NDArray[np.int64], view: int) -> Draw:
    """Return the parameters of view number ``view`` of these samples in this epoch."""
    u = rng.uniform_columns(seed, "view", epoch, index, view, num=_NUM_DRAWS)
    return _parameters(spec, u, any_channels.draw(_augment(spec), len(spec.mean), seed, epoch, index, view))


def draws(specs: Sequence[ViewSpec], seed: int, epoch: rng.Counter, index: npt.NDArray[np.int64]) -> list[Draw | None]:
    """Return the parameters of every view of these samples, with None for evaluation views.

    The random numbers of all views are made together, which for a small batch takes little longer than for one view.
    """
    drawn: list[Draw | None] = [None] * len(specs)
    random_views = [view for view, spec in enumerate(specs) if spec.augment is not None]
    if not random_views:
        return drawn
    u = rng.uniform_columns(seed, "view", epoch, index, np.array(random_views)[:, None], num=_NUM_DRAWS)
    u = u.reshape(_NUM_DRAWS, len(random_views), len(index))
    for row, view in enumerate(random_views):
        spec = specs[view]
        further = any_channels.draw(_augment(spec), len(spec.mean), seed, epoch, index, view)
        drawn[view] = _parameters(spec, u[:, row], further)
    return drawn


def _augment(spec: ViewSpec) -> Augment:
    assert spec.augment is not None, "the evaluation view draws nothing"
    return spec.augment


def _parameters(spec: ViewSpec, u: npt.NDArray[np.float64], further: dict[str, npt.NDArray[Any]]) -> Draw:
    """Turn (_NUM_DRAWS, N) random numbers into the parameters of a view.  further: those of ``any_channels``."""
    a = _augment(spec)
    area, ratio, rest = u[:_NUM_BOXES], u[_NUM_BOXES : 2 * _NUM_BOXES], u[2 * _NUM_BOXES :]
    jitter = rest[3] < a.jitter

    def factor(value: npt.NDArray[np.float64], strength: float) -> npt.NDArray[np.float64]:
        low = max(0.0, 1 - strength)
        return np.where(jitter, low + (1 + strength - low) * value, 1.0)

    log_ratio = math.log(a.max_ratio)
    sigma = MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * rest[10]
    widest = widest_window(spec) // 2  # pixels each way
    drawn = {
        "area": (a.min_scale + (a.max_scale - a.min_scale) * area).T,
        "ratio": np.exp(log_ratio * (2 * ratio - 1)).T,
        "place": np.minimum(rest[0:2], 1 - 2.0**-24).T,  # the largest draws would round to 1 in float32
        "flip": rest[2] < a.flip,
        "brightness": factor(rest[4], a.brightness),
        "contrast": factor(rest[5], a.contrast),
        "saturation": factor(rest[6], a.saturation),
        "hue": np.where(jitter, a.hue * (2 * rest[7] - 1), 0.0),
        "gray": rest[8] < a.gray,
        "blur": rest[9] < a.blur,
        "sigma": sigma,
        "window": 2 * np.minimum(np.ceil(3 * sigma), widest) + 1,
        "solarize": rest[11] < a.solarize,
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.ascontiguousarray(value, dtype=np.float32) for name, value in drawn.items()
    }
    return Draw(**arrays, **further)


def boxes(spec: ViewSpec, drawn: Draw | None, height: npt.ArrayLike, width: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return (N, 4) boxes (top, left, bottom, right) in pixels of images of (N,) heights and widths.

    A sample's box is, by torchvision's rule, the first of its ten candidates that fits its image, or else the largest
    centered box within the allowed ratios.  With ``drawn=None`` it is the evaluation view's central square.
    """
    height, width = np.asarray(height, dtype=np.float32), np.asarray(width, dtype=np.float32)
    size = np.stack([height, width], axis=1)
    if drawn is None or spec.augment is None:
        side = np.maximum(np.floor(size.min(axis=1, keepdims=True) * spec.center + 0.5), 1)
        start = np.floor((size - side) / 2)
        return np.concatenate([start, start + side], axis=1).astype(np.int64)
    root = np.sqrt(height * width)[:, None]
    tall = np.floor(np.sqrt(drawn.area / drawn.ratio) * root + 0.5)  # (N, 10), as is wide
    wide = np.floor(np.sqrt(drawn.area * drawn.ratio) * root + 0.5)
    fits = (tall >= 1) & (tall <= height[:, None]) & (wide >= 1) & (wide <= width[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(size))
    chosen = np.stack([tall[rows, first], wide[rows, first]], axis=1)
    largest = np.minimum(size, np.floor(size[:, ::-1] * spec.augment.max_ratio + 0.5))
    any_fits = fits[rows, first][:, None]
    box = np.where(any_fits, chosen, largest)
    start = np.floor(np.where(any_fits, drawn.place * (size - box + 1), (size - box) / 2))
    return np.concatenate([start, start + box], axis=1).astype(np.int64)
