"""Facts: the properties of a source's images that methods, probes and checks may use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # so that the options of methods and sources need no numpy
    import numpy as np
    import numpy.typing as npt

Depth = Literal["uint8", "uint16", "float32"]
_MAX_BLOCKS_SAMPLED = 16


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The channels of a source's images, and what their values mean.

    num: the number of channels.
    full_scale: the value of white.  If pixels other than uint8 leave it at 255, black and white are measured.
    is_rgb: whether the channels are red, green and blue, so that saturation, hue and gray have a meaning.
    black: the value of black.  Values outside black and white count as these.
    dtype: the type of the pixels.  Nothing rounds them to fewer levels until they are normalized.
    """

    num: int = 3
    full_scale: float = 255.0
    is_rgb: bool = True
    black: float = 0.0
    dtype: Depth = "uint8"

    def __post_init__(self) -> None:
        if self.num < 1 or (self.is_rgb and self.num != 3):
            raise ValueError(
                f"expected one or more channels, and three if they are RGB, got {self.num} with is_rgb={self.is_rgb}"
            )
        if self.dtype not in get_args(Depth) or not -math.inf < self.black < self.full_scale < math.inf:
            raise ValueError(
                f"expected channels of a type among {', '.join(get_args(Depth))} with black below white, got "
                f"{self.dtype}, from {self.black:g} to {self.full_scale:g}"
            )

    @property
    def is_plain(self) -> bool:
        """Whether the images are RGB of 8 bits, which every backend reads."""
        return self == RGB

    @property
    def states_range(self) -> bool:
        """Whether black and white are known, without measuring them."""
        return self.dtype == "uint8" or self.full_scale != Channels.full_scale

    @property
    def in_words(self) -> str:
        """The channels in a few words, such as "5 channels of 16 bits, from 0 to 4095"."""
        number = "RGB" if self.is_rgb else f"{self.num} channel{'s' * (self.num > 1)}"
        if self.dtype == "uint8":
            return f"{number} of 8 bits"
        depth = "of 16 bits" if self.dtype == "uint16" else "of floating-point numbers"
        return f"{number} {depth}, from {self.black:g} to {self.full_scale:g}"


RGB = Channels()
"""RGB of 8 bits, which every backend reads."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Consecutive samples of a source that are seen more or less often than others.

    num_samples: their number, at least 1.  weight: how often each is seen in an epoch, on average.
    """

    num_samples: int
    weight: float

    @property
    def num_per_epoch(self) -> int:
        """The number of samples drawn from the share in each epoch, at least 1."""
        return max(1, int(self.num_samples * self.weight + 0.5))


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """The facts about a source.

    num_samples: the number of images.  size: the suitable side of their views, in pixels.  labels: (N,) int64, the
    class of each image, or None without labels.  classes: the names of the classes.  channels: the images' channels.
    captions: the captions of each image, one or more, or None without captions.
    blocks: (num_blocks,) int64, ascending from 0, the first sample of each block that is best read as a whole (a tar
    file, a row group of a Parquet file); None if all samples can be read equally fast.
    shares: the shares that the samples consist of, in order, if not all are seen once in an epoch.
    """

    num_samples: int
    size: int
    labels: "npt.NDArray[np.int64] | None" = None
    classes: tuple[str, ...] | None = None
    channels: Channels = RGB
    captions: Sequence[Sequence[str]] | None = None
    blocks: "npt.NDArray[np.int64] | None" = None
    shares: tuple[Share, ...] | None = None

    @property
    def num_per_epoch(self) -> int:
        """The number of samples in an epoch."""
        return sum(share.num_per_epoch for share in self.shares) if self.shares else self.num_samples

    @property
    def has_classes(self) -> bool:
        """Whether every image has a label and there are at least two classes."""
        return self.labels is not None and len(self.classes or ()) > 1

    def sample(self, number: int) -> list[int]:
        """Return the indices of up to ``number`` images, evenly spaced, from at most 16 blocks."""
        size = self.num_samples
        number = min(number, size)
        if self.blocks is None or len(self.blocks) <= _MAX_BLOCKS_SAMPLED:
            return [place * size // number for place in range(number)]
        limits = [*self.blocks.tolist(), size]
        parts = [place * len(self.blocks) // _MAX_BLOCKS_SAMPLED for place in range(_MAX_BLOCKS_SAMPLED)]
        sample: list[int] = []
        for block in parts:
            first, length = limits[block], limits[block + 1] - limits[block]
            count = min(length, number // _MAX_BLOCKS_SAMPLED)
            sample += [first + place * length // count for place in range(count)]
        return sample

    def take(self, index: "npt.NDArray[np.int64]") -> "Facts":
        """Return the facts about the images at these indices (K,), without blocks and shares."""
        labels = None if self.labels is None else self.labels[index]
        captions = None if self.captions is None else [self.captions[i] for i in index.tolist()]
        return replace(self, num_samples=len(index), labels=labels, captions=captions, blocks=None, shares=None)
