"""What follows DALI's graph, on the views' own device: colours, blur, solarize, normalise.

Saturation, hue and grayscale are linear in RGB, so together they are one 3x3 matrix a sample: a batched matrix
product instead of three passes.  torchvision shifts hue in HSV, which is not linear; here it is a rotation
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

from sslx.data import views
from sslx.data.views import Draw, FloatArray, ViewSpec

_CACHED = 2**18  # values finished at a time on a CPU: 1 MB, which stays in its cache from one operation to the next
_TILE = 56  # rows of a blur's banded matrix multiplied at a time
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
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, channels_last: colours, blur, solarize, normalise.

    drawn: the samples' parameters, None for the evaluation view.
    """
    number, height, width, _ = image.shape
    mix = None if drawn is None else _tensor(matrix(drawn), image)
    scale = _tensor(np.tile(1 / (255 * np.array(spec.std)), width), image)
    shift = _tensor(np.tile(-np.array(spec.mean) / np.array(spec.std), width), image)
    out = torch.empty((number, height, width, 3), device=image.device)
    step = number if image.is_cuda else max(1, _CACHED // (height * width * 3))
    for part in (slice(start, start + step) for start in range(0, number, step)):
        pixels = image[part].float() if mix is None else _mixed(image[part], mix[part]).clamp_(0, 255)
        if drawn is not None and drawn.blur[part].any():
            chosen = np.flatnonzero(drawn.blur[part])
            every = len(chosen) == len(pixels)  # as on a CPU with large views, one at a time: nothing to gather
            rows = slice(None) if every else torch.from_numpy(chosen).to(image.device, non_blocking=True)
            sigma, window = drawn.sigma[part][chosen], drawn.window[part][chosen]
            pixels[rows] = _blurred(pixels[rows], sigma, window, views.widest_window(spec) // 2)
        if drawn is not None and drawn.solarize[part].any():
            flag = torch.from_numpy(drawn.solarize[part] > 0).to(image.device, non_blocking=True)
            pixels = torch.where(flag[:, None, None, None] & (pixels >= 128), 255 - pixels, pixels)
        torch.addcmul(shift, pixels.view(-1, height, width * 3), scale, out=out[part].view(-1, height, width * 3))
    return out.permute(0, 3, 1, 2)


def _mixed(image: Tensor, mix: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 times (N, 3, 3) -> (N, H, W, 3) float32.

    Several pixels a row, each with the matrix on its diagonal block: the same sums, and zeros, in a product of a
    width that a BLAS has fast code for: on a CPU the whole of ``finish`` takes half the time of rows of three.
    """
    number, height, width, _ = image.shape
    pixels = math.gcd(height * width, 8)
    blocks = mix.new_zeros(number, pixels, 3, pixels, 3)
    diagonal = torch.arange(pixels, device=image.device)
    blocks[:, diagonal, :, diagonal] = mix.mT  # pixels are rows, so the matrix stands transposed on the right
    rows = image.reshape(number, height * width // pixels, pixels * 3).float()
    return torch.bmm(rows, blocks.view(number, pixels * 3, pixels * 3)).view(image.shape)


def _blurred(image: Tensor, sigma: FloatArray, window: FloatArray, reach: int) -> Tensor:
    """(N, H, W, 3) with a Gaussian of each sample's sigma and window, in pixels; mirrored at the borders.

    Down and across, each a product with a banded matrix: on a CPU in a third of the time of DALI's filter.  As
    wide for all samples as the recipe needs (reach, to each side), so that none depends on its neighbours.
    """
    offset = np.arange(-reach, reach + 1)
    # Outside the window 0 and not tiny: a CPU multiplies denormals far more slowly.
    weight = np.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (np.abs(offset) <= window[:, None] // 2)
    taps = _tensor(weight / weight.sum(axis=1, keepdims=True), image)
    planes = image.permute(0, 3, 1, 2).contiguous()
    return _filtered(_filtered(planes, taps).mT, taps).permute(0, 3, 2, 1)


def _filtered(planes: Tensor, taps: Tensor) -> Tensor:
    """(N, 3, H, W) with the (N, 2 reach + 1) taps along H."""
    (number, _, side, _), reach = planes.shape, taps.shape[1] // 2
    wide = side + 2 * reach
    band = taps.new_zeros(number, side, wide)  # row i: the taps at i, on a line with reach more pixels at both ends
    diagonal = band.as_strided((number, side, 2 * reach + 1), (side * wide, wide + 1, 1))
    diagonal.copy_(taps[:, None].expand_as(diagonal))
    band[:, :, reach + 1 : 2 * reach + 1] += band[:, :, :reach].flip(2)  # which mirror those inside
    band[:, :, side - 1 : side + reach - 1] += band[:, :, side + reach :].flip(2)
    band = band[:, None, :, reach : side + reach]
    tiles: list[Tensor] = []
    for start in range(0, side, _TILE):  # of a tile's rows, all but these columns are 0
        rows, columns = slice(start, start + _TILE), slice(max(0, start - reach), start + _TILE + reach)
        tiles.append(band[:, :, rows, columns] @ planes[:, :, columns])
    return torch.cat(tiles, dim=2)


def _tensor(values: npt.NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device, non_blocking=True)
