"""Rotations, color operations, blur, solarize, gain, noise and normalization: what torch applies after DALI's graph, on
the views' device.

Saturation, hue and grayscale are linear in RGB, so together they are one 3x3 matrix per sample: one pass instead of
three.  torchvision shifts hue in HSV, which is not linear; here the shift is a rotation about the gray axis of RGB,
the closest linear map (a least-squares fit finds the same one), exact at thirds of a turn.  The rotation in YIQ of
DALI's own operator has up to twice the error, and at 0.1 turns it is no closer than leaving the hue unchanged
(tests/data/backends/test_parity.py).

Unlike torchvision, this does not clip after each operation: saturation followed by grayscale differs by 3 levels of
255 on average and by 10 in the worst view.
"""

import math
from collections.abc import Mapping
from functools import reduce

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sslx.data import views
from sslx.data.backends import row_sums, turns
from sslx.data.backends.selection import changed, selected
from sslx.data.backends.sensor import Sensor
from sslx.data.transfer import Arrays, send
from sslx.data.views import Draw, ViewSpec

LUMA = np.array([0.299, 0.587, 0.114])
"""The weights of red, green and blue in gray: ITU-R BT.601, as in PIL, torchvision and DALI."""
_LUMA = np.outer(np.ones(3), LUMA)
_MEAN = np.full((3, 3), 1 / 3)
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # with the gray axis


def matrix(drawn: Draw) -> npt.NDArray[np.float64]:
    """Return (N, 3, 3) matrices for RGB columns: saturation, then hue as a rotation about the gray axis, then gray."""
    s, hue = (x.astype(np.float64)[:, None, None] for x in (drawn.saturation, drawn.hue))
    cos, sin = np.cos(2 * math.pi * hue), np.sin(2 * math.pi * hue)
    rotation = cos * np.eye(3) + (1 - cos) * _MEAN + sin * _CROSS  # Rodrigues' formula
    turned = rotation @ (s * np.eye(3) + (1 - s) * _LUMA)
    return np.where(drawn.gray[:, None, None] > 0, _LUMA @ turned, turned)


class Finish:
    """All operations of one view that come after its crop and flips, with constants on the device.

    Images that are not RGB have no color operations.  jitter: apply brightness and contrast before the color
    operations, if nothing has applied them before.
    """

    def __init__(self, spec: ViewSpec, device: torch.device, *, jitter: bool = False) -> None:
        self.spec, self.jitter = spec, jitter or turns.delays_jitter(spec)
        self._sensor = Sensor(spec, device)
        self._scale = _constant(np.tile(1 / (255 * np.array(spec.std)), spec.size), device)
        self._shift = _constant(np.tile(-np.array(spec.mean) / np.array(spec.std), spec.size), device)

    def parameters(self, drawn: Draw | None) -> Arrays:
        """Return the arrays that a call needs on its device, from the parameters drawn for a batch of N samples."""
        if drawn is None:
            return {}
        arrays: Arrays = {}
        if self.spec.channels.is_rgb:
            arrays["mix"] = matrix(drawn).astype(np.float32)
        if self.jitter:
            arrays |= jitter_parameters(drawn)
        if len(rows := np.flatnonzero(drawn.blur)):
            arrays |= {"blurred": rows, "taps": _taps(drawn.sigma[rows], drawn.window[rows], self._reach)}
        if len(rows := np.flatnonzero(drawn.solarize)):
            arrays["solarized"] = rows
        return arrays | turns.parameters(drawn) | self._sensor.parameters(drawn)

    def __call__(self, drawn: Draw | None, image: Tensor, sent: Mapping[str, Tensor] | None = None) -> Tensor:
        """Turn (N, size, size, C) uint8 or float32 into (N, C, size, size) float32, channels_last, normalized.

        drawn: the samples' parameters, None for the evaluation view.  sent: ``parameters(drawn)`` on the image's
        device; by default they are sent now.  Each sample's view is the same to the last bit in any batch.
        """
        if sent is None:
            (sent,) = send([self.parameters(drawn)], image.device)
        number, height, width, channels = image.shape
        out = torch.empty((number, height, width, channels), device=image.device)
        for part in row_sums.parts(image, height * width * channels):
            if drawn is None:
                out[part] = image[part]
            else:
                out[part] = self._augmented(drawn, part, image[part], sent).permute(0, 2, 3, 1)
                self._sensor.change(out[part], drawn, part, sent)
            rows = out[part].view(-1, height, width * channels)
            torch.addcmul(self._shift, rows, self._scale, out=rows)
        return out.permute(0, 3, 1, 2)

    @property
    def _reach(self) -> int:
        """The number of pixels to each side in the widest blur window."""
        return views.widest_window(self.spec) // 2

    def _augmented(self, drawn: Draw, part: slice, image: Tensor, sent: Mapping[str, Tensor]) -> Tensor:
        """Turn (N, H, W, C) into (N, C, H, W) float32 in [0, 255].  part: the samples' rows in ``drawn``, ``sent``."""
        pixels = turns.turned(image.permute(0, 3, 1, 2).float().contiguous(), drawn, part, sent)
        if self.jitter:
            jitter(pixels, drawn, part, sent, is_rgb=self.spec.channels.is_rgb)
        if "mix" in sent:
            pixels = row_sums.mixed(pixels, sent["mix"][part]).clamp_(0, 255)
        if drawn.blur[part].any():
            chosen, chosen_rows = selected(drawn.blur, part)
            widest = int(drawn.window[part][chosen].max()) // 2
            taps = sent["taps"][chosen_rows, self._reach - widest : self._reach + widest + 1]
            pixels = changed(pixels, part, chosen, sent["blurred"][chosen_rows], lambda images: _blurred(images, taps))
        if drawn.solarize[part].any():
            chosen, chosen_rows = selected(drawn.solarize, part)
            pixels = changed(pixels, part, chosen, sent["solarized"][chosen_rows], _solarized)
        return pixels


def jitter_parameters(drawn: Draw) -> Arrays:
    """Return the arrays that ``jitter`` needs on the device."""
    factors = {"brightness": drawn.brightness, "contrast": drawn.contrast}
    return {name: values for name, values in factors.items() if (values != 1).any()}


def jitter(pixels: Tensor, drawn: Draw, part: slice, sent: Mapping[str, Tensor], *, is_rgb: bool = True) -> None:
    """Apply brightness, then contrast, in place: (N, C, H, W) float32 in [0, 255].

    Brightness multiplies all channels by one factor.  Contrast moves them away from the mean of the image, or toward
    it: of its luma if it is RGB, else of all channels.  Samples without jitter stay the same to the last bit beside
    jittered ones: they are multiplied by 1 and 0 is added.
    """
    if (drawn.brightness[part] != 1).any():
        pixels.mul_(sent["brightness"][part, None, None, None]).clamp_(0, 255)
    if (drawn.contrast[part] != 1).any():
        contrast = sent["contrast"][part, None, None, None]
        gray = _gray(pixels, is_rgb) * (1 - contrast)
        pixels.mul_(contrast).add_(gray).clamp_(0, 255)


def _gray(pixels: Tensor, is_rgb: bool) -> Tensor:
    """Return the mean luma of each image, or of one that is not RGB its mean: (N, C, H, W) in [0, 255] -> (N, 1, 1, 1).

    Lumas are rounded to 2^-16, so that fp64 adds them exactly: the order of the sum, which on a GPU depends on the
    batch, makes no difference.
    """
    num = pixels.shape[1]
    weights = LUMA if is_rgb else np.full(num, 1 / num)
    luma = reduce(torch.add, (plane * weight for plane, weight in zip(pixels.unbind(1), weights, strict=True)))
    sums = luma.mul_(2.0**16).round_().sum((1, 2), dtype=torch.float64)
    return (sums / (2.0**16 * luma[0].numel())).float()[:, None, None, None]


def _solarized(pixels: Tensor) -> Tensor:
    return torch.where(pixels >= 128, 255 - pixels, pixels)


def _taps(sigma: npt.NDArray[np.float32], window: npt.NDArray[np.float32], reach: int) -> npt.NDArray[np.float32]:
    """Return the weights of a Gaussian with each sample's sigma within its window, in pixels: (N, 2 reach + 1).

    They are as wide as the recipe needs for all samples, so that no sample depends on its neighbors.
    """
    offset = np.arange(-reach, reach + 1)
    # Exact zeros outside the window, because CPUs multiply denormals far more slowly.
    weight = np.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (np.abs(offset) <= window[:, None] // 2)
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _blurred(planes: Tensor, taps: Tensor) -> Tensor:
    """Blur (N, C, H, W) down and across by each sample's taps (N, T), mirrored at the borders."""
    for _ in range(2):
        planes = row_sums.filtered(planes, _mirrored(planes, taps.shape[1] // 2), taps[:, None]).mT
    return planes


def _mirrored(planes: Tensor, reach: int) -> Tensor:
    """Return the rows around each row, reflected at the borders without repeating them: (1, H, 2 reach + 1)."""
    last = planes.shape[2] - 1
    rows = torch.arange(last + 1, device=planes.device)[:, None] + torch.arange(-reach, reach + 1, device=planes.device)
    return (last - (last - rows.abs()).abs()).clamp_(min=0)[None]


def _constant(values: npt.NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
