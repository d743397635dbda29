"""Gain per channel and Gaussian noise: the last operations before normalization, the same code for all backends.

The noise of a pixel is a function of the sample's key alone: Philox (``rng.words_on_device``) gives eight 16-bit
numbers for each of its counters, and a table maps them to 65,536 quantiles of the normal distribution, up to 4.3
standard deviations.  Integers and a table are exact, so that the noise is the same to the last bit on CPUs and GPUs and
in any batch.  Nothing is sent to a GPU but the keys.  A CPU needs about three times as long as for ``torch.randn``,
whose noise would depend on the device and on the batch.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sslx import rng
from sslx.data.backends import row_sums
from sslx.data.backends.selection import changed, selected
from sslx.data.transfer import Arrays
from sslx.data.views import Draw, ViewSpec

_NUM_QUANTILES = 1 << 16


class Sensor:
    """Gain and noise of one view, with constants on the device."""

    def __init__(self, spec: ViewSpec, device: torch.device) -> None:
        augment = spec.augment
        self.is_used = augment is not None and (augment.gain > 0 or augment.noise > 0)
        self._quantiles = _normal_quantiles().to(device) if augment is not None and augment.noise > 0 else None

    def parameters(self, drawn: Draw | None) -> Arrays:
        """Return the arrays that a call needs on its device."""
        arrays = Arrays()
        if drawn is not None and drawn.gain is not None:
            arrays["gain"] = drawn.gain
        if drawn is not None and drawn.noise is not None and drawn.noise_key is not None:
            rows = np.flatnonzero(drawn.noise)
            arrays |= {"noisy": rows, "noise": drawn.noise[rows], "noise_key": drawn.noise_key[rows]}
        return arrays

    def __call__(
        self, drawn: Draw | None, views: Tensor, sent: Mapping[str, Tensor], *, full_scale: float = 255.0
    ) -> Tensor:
        """Return views (N, S, S, C) of a whole batch with gain and noise, as float32, or as they were."""
        if drawn is None or not self.is_used:
            return views
        views = views.to(torch.float32, copy=True)
        for part in row_sums.parts(views, math.prod(views.shape[1:])):
            self.change(views[part], drawn, part, sent, full_scale=full_scale)
        return views

    def change(
        self, pixels: Tensor, drawn: Draw, part: slice, sent: Mapping[str, Tensor], *, full_scale: float = 255.0
    ) -> None:
        """Apply gain and noise in place to a part of the batch: (N, S, S, C) float32 from 0 to full scale, contiguous.

        sent: ``parameters`` of the batch on the device.
        """
        if drawn.gain is not None:
            pixels.mul_(sent["gain"][part, None, None]).clamp_(0, full_scale)
        if drawn.noise is not None and drawn.noise[part].any():
            chosen, rows = selected(drawn.noise, part)
            deviation, keys = sent["noise"][rows, None, None, None] * full_scale, sent["noise_key"][rows]
            changed(
                pixels, part, chosen, sent["noisy"][rows],
                lambda views: views.add_(self._normal(keys, views).mul_(deviation)).clamp_(0, full_scale),
            )  # fmt: skip

    def _normal(self, keys: Tensor, views: Tensor) -> Tensor:
        """Return standard normal numbers of the shape of ``views``, each row a function of its key."""
        assert self._quantiles is not None
        num_values = math.prod(views.shape[1:])
        halves = rng.words_on_device(keys, -(-num_values // 8)).view(torch.uint16)
        index = halves.int().flatten(1)[:, :num_values]
        return self._quantiles.index_select(0, index.flatten()).view_as(views)


@cache
def _normal_quantiles() -> Tensor:
    """Return the medians of equally likely parts of a normal distribution, ascending, with a variance of exactly 1."""
    probability = (torch.arange(_NUM_QUANTILES, dtype=torch.float64) + 0.5) / _NUM_QUANTILES
    quantiles = torch.special.ndtri(probability)
    return (quantiles / quantiles.square().mean().sqrt()).float()
