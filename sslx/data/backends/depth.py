"""Pixels of any type as floats on one scale, without rounding: what backends crop, resize and augment."""

import torch
from torch import Tensor

from sslx.data.facts import Channels


def scaled(pixels: Tensor, channels: Channels, white: float) -> Tensor:
    """Return pixels as float32 from 0 (black) to ``white``, in which 16 bits differ as before.

    Values outside the range of the source's black and white become these.
    """
    pixels = pixels.float()
    if channels.black:
        pixels = pixels - channels.black
    if (factor := white / (channels.full_scale - channels.black)) != 1:
        pixels = pixels * factor
    return pixels if channels.dtype == "uint8" else pixels.clamp(0, white)


def chosen(images: Tensor, index: Tensor, channels: Channels) -> Tensor:
    """Return some of the images (N, C, H, W) in memory as float32 from 0 to 255."""
    if images.dtype == torch.uint16:  # which torch does not index on every device
        return scaled(images.view(torch.int16)[index].view(torch.uint16), channels, 255)
    return scaled(images[index], channels, 255)
