"""What is linear in the colours of a view, as one matrix a sample, on the batch's own device.

Saturation, hue, grayscale and normalisation are affine maps of RGB, so together they are one: a batched matrix
product instead of four passes.  Hue is a rotation of the YIQ plane, as in DALI's own operators; torchvision
shifts it in HSV instead, which is not linear (README, "Augmentation", has the measured difference).
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data.views import Draw, ViewSpec

_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_RGB = np.linalg.inv(_YIQ)
_LUMA = np.outer(np.ones(3), _YIQ[0])  # ITU-R BT.601, as in PIL, torchvision and DALI


def matrix(drawn: Draw) -> npt.NDArray[np.float64]:
    """(N, 3, 3) on RGB columns: saturation, then a rotation of hue in the YIQ plane, then grayscale."""
    s, angle = drawn.saturation.astype(np.float64)[:, None, None], 2 * math.pi * drawn.hue.astype(np.float64)
    rotation = np.zeros((len(angle), 3, 3))
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = np.cos(angle)
    # In the (I, Q) plane the colour circle runs from red over yellow to green with a falling angle.
    rotation[:, 1, 2], rotation[:, 2, 1] = np.sin(angle), -np.sin(angle)
    turned = _RGB @ rotation @ _YIQ @ (s * np.eye(3) + (1 - s) * _LUMA)
    return np.where(drawn.gray[:, None, None] > 0, _LUMA @ turned, turned)


def finish(spec: ViewSpec, drawn: Draw | None, image: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels_last: colours, solarize, clip, normalise.

    drawn: the samples' parameters, None for the evaluation view.
    """
    number, height, width, _ = image.shape
    scale = 1 / (255 * np.array(spec.std))
    shift = -np.array(spec.mean) / np.array(spec.std)
    mix = np.broadcast_to(np.eye(3), (number, 3, 3)) if drawn is None else matrix(drawn)
    low, high = shift, 255 * scale + shift
    # Rows are pixels, so the matrices stand transposed on the right; solarize follows before normalisation.
    solarize = spec.augment is not None and spec.augment.solarize > 0
    first = mix if solarize else scale[:, None] * mix
    weight = torch.from_numpy(first.transpose(0, 2, 1).astype(np.float32)).to(image.device, non_blocking=True)
    pixels = image.reshape(number, height * width, 3).float()
    if solarize:
        assert drawn is not None
        flag = torch.from_numpy(drawn.solarize[:, None, None] > 0).to(image.device, non_blocking=True)
        pixels = torch.bmm(pixels, weight).clamp_(0, 255)
        pixels = torch.where(flag & (pixels >= 128), 255 - pixels, pixels) * _tensor(scale, image) + _tensor(shift, image)
    else:
        pixels = torch.baddbmm(_tensor(shift, image), pixels, weight)
        torch.clamp(pixels, _tensor(low, image), _tensor(high, image), out=pixels)
    return pixels.view(number, height, width, 3).permute(0, 3, 1, 2)


def _tensor(values: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True)
