"""What is linear in the colours of a view, as one matrix a sample, on the batch's own device.

Saturation, hue, grayscale and normalisation are affine maps of RGB, so together they are one: a batched matrix
product instead of four passes.  torchvision shifts hue in HSV, which is not linear; here it is a rotation
about the gray axis of RGB: the linear map that comes closest (a least-squares fit finds the same one), exact at
thirds of a turn.  The rotation in YIQ of DALI's own operator is up to twice as far off, and at 0.1 turns no
closer than leaving hue as it is (tests/data/test_parity.py).

Unlike torchvision's, the parts are not clipped one by one: saturation and then grayscale differ by 3 levels of
255 on average, by 10 in the worst view.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data.views import Draw, ViewSpec

_LUMA = np.outer(np.ones(3), (0.299, 0.587, 0.114))  # ITU-R BT.601, as in PIL, torchvision and DALI
_MEAN = np.full((3, 3), 1 / 3)
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # with the gray axis


def matrix(drawn: Draw) -> npt.NDArray[np.float64]:
    """(N, 3, 3) on RGB columns: saturation, then a rotation of hue about the gray axis, then grayscale."""
    s, hue = (x.astype(np.float64)[:, None, None] for x in (drawn.saturation, drawn.hue))
    cos, sin = np.cos(2 * math.pi * hue), np.sin(2 * math.pi * hue)
    rotation = cos * np.eye(3) + (1 - cos) * _MEAN + sin * _CROSS  # Rodrigues' formula
    turned = rotation @ (s * np.eye(3) + (1 - s) * _LUMA)
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
        pixels = torch.where(flag & (pixels >= 128), 255 - pixels, pixels) * _tensor(scale, image) + _tensor(
            shift, image
        )
    else:
        pixels = torch.baddbmm(_tensor(shift, image), pixels, weight)
        # Bounds as wide as an image: a CPU clamps by a broadcast row of three ten times slower.
        bounds = (_tensor(np.tile(bound, (height * width, 1)), image) for bound in (low, high))
        torch.clamp(pixels, *bounds, out=pixels)
    return pixels.view(number, height, width, 3).permute(0, 3, 1, 2)


def _tensor(values: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True)
