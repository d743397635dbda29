"""What follows DALI's graph, on the views' own device: colours, blur, solarize, normalise.

Saturation, hue and grayscale are linear in RGB, so together they are one 3x3 matrix a sample: one pass instead of
three.  torchvision shifts hue in HSV, which is not linear; here it is a rotation
about the gray axis of RGB: the linear map that comes closest (a least-squares fit finds the same one), exact at
thirds of a turn.  The rotation in YIQ of DALI's own operator is up to twice as far off, and at 0.1 turns no
closer than leaving hue as it is (tests/data/test_parity.py).

Unlike torchvision's, the parts are not clipped one by one: saturation and then grayscale differ by 3 levels of
255 on average, by 10 in the worst view.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data import row_sums, views
from sslx.data.views import Draw, FloatArray, ViewSpec

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
    """(N, H, W, 3) uint8 or float32 -> (N, 3, H, W) float32, channels_last: colours, blur, solarize, normalise.

    drawn: the samples' parameters, None for the evaluation view.  Each sample's view is the same to the last bit
    whatever else is in its batch.
    """
    number, height, width, _ = image.shape
    mix = None if drawn is None else _tensor(matrix(drawn), image)
    scale = _tensor(np.tile(1 / (255 * np.array(spec.std)), width), image)
    shift = _tensor(np.tile(-np.array(spec.mean) / np.array(spec.std), width), image)
    out = torch.empty((number, height, width, 3), device=image.device)
    for part in row_sums.parts(image, height * width * 3):
        if drawn is None or mix is None:
            out[part] = image[part]
        else:
            out[part] = _augmented(spec, drawn, part, image[part], mix[part]).permute(0, 2, 3, 1)
        rows = out[part].view(-1, height, width * 3)
        torch.addcmul(shift, rows, scale, out=rows)
    return out.permute(0, 3, 1, 2)


def _augmented(spec: ViewSpec, drawn: Draw, part: slice, image: Tensor, mix: Tensor) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W) float32 in [0, 255].  part: the samples' rows in ``drawn``."""
    pixels = row_sums.mixed(image.permute(0, 3, 1, 2).float().contiguous(), mix).clamp_(0, 255)
    if drawn.blur[part].any():
        chosen = np.flatnonzero(drawn.blur[part])
        sigma, window = drawn.sigma[part][chosen], drawn.window[part][chosen]
        pixels = _changed(pixels, chosen, lambda some: _blurred(some, sigma, window, views.widest_window(spec) // 2))
    if drawn.solarize[part].any():
        pixels = _changed(pixels, np.flatnonzero(drawn.solarize[part]), _solarized)
    return pixels


def _changed(pixels: Tensor, chosen: npt.NDArray[np.int64], change: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, 3, H, W), with ``change`` made to the chosen samples."""
    if len(chosen) == len(pixels):  # as on a CPU with large views, one at a time: nothing to gather
        return change(pixels)
    rows = torch.from_numpy(chosen).to(pixels.device, non_blocking=True)
    return pixels.index_copy_(0, rows, change(pixels.index_select(0, rows)))


def _solarized(pixels: Tensor) -> Tensor:
    return torch.where(pixels >= 128, 255 - pixels, pixels)


def _blurred(planes: Tensor, sigma: FloatArray, window: FloatArray, reach: int) -> Tensor:
    """(N, 3, H, W) with a Gaussian of each sample's sigma and window, in pixels; mirrored at the borders.

    Down and across.  The weights are computed as wide for all samples as the recipe needs (reach, to each side), so
    that none depends on its neighbours, and those that are 0 for all of them are left out.
    """
    offset = np.arange(-reach, reach + 1)
    # Outside the window 0 and not tiny: a CPU multiplies denormals far more slowly.
    weight = np.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (np.abs(offset) <= window[:, None] // 2)
    widest = int(window.max()) // 2
    taps = _tensor((weight / weight.sum(axis=1, keepdims=True))[:, reach - widest : reach + widest + 1], planes)
    for _ in range(2):
        planes = row_sums.filtered(planes, _mirrored(planes, widest), taps[:, None]).mT
    return planes


def _mirrored(planes: Tensor, reach: int) -> Tensor:
    """(1, H, 2 reach + 1): the rows around each row; beyond the border those inside, the border itself not again."""
    last = planes.shape[2] - 1
    rows = torch.arange(last + 1, device=planes.device)[:, None] + torch.arange(-reach, reach + 1, device=planes.device)
    return (last - (last - rows.abs()).abs()).clamp_(min=0)[None]


def _tensor(values: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True)
