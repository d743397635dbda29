"""The draws of the augmentations for any number of channels: vertical flip, rotations, gain per channel and noise.

They come from streams of random numbers of their own, used only where a recipe has such an operation, so that all other
parameters are those of a recipe without it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data.augment import Augment

_NUM_DRAWS = 8  # random numbers per view of a sample, apart from the factors and the noise


def draw(
    augment: Augment, num_channels: int, seed: int, epoch: rng.Counter, index: npt.NDArray[np.int64], view: int
) -> dict[str, npt.NDArray[Any]]:
    """Return the fields of ``views.Draw`` that the augmentation needs of these operations, (N, ...) each, by name.

    The draws of one operation do not depend on the settings of another, nor those of a channel on their number.
    """
    a, drawn = augment, dict[str, npt.NDArray[Any]]()
    if not any((a.vertical_flip, a.right_angles, a.rotate, a.gain, a.noise)):
        return drawn
    u = rng.uniform_columns(seed, "view, any channels", epoch, index, view, num=_NUM_DRAWS)
    if a.vertical_flip:
        drawn["vertical_flip"] = u[0] < a.vertical_flip
    if a.right_angles:
        drawn["quarter_turns"] = np.where(u[1] < a.right_angles, 1 + np.floor(3 * u[2]), 0)
    if a.rotate:
        drawn["angle"] = np.where(u[3] < a.rotate, a.max_angle * (2 * u[4] - 1), 0)
    if a.gain:
        low, high = max(0.0, 1 - a.gain_strength), 1 + a.gain_strength
        factors = low + (high - low) * rng.uniform(seed, "gain", epoch, index, view, num=num_channels)
        drawn["gain"] = np.where(u[5][:, None] < a.gain, factors, 1.0)
    if a.noise:
        drawn["noise"] = np.where(u[6] < a.noise, a.max_noise * u[7], 0)
    parameters = dict[str, npt.NDArray[Any]]()
    parameters |= {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in drawn.items()}
    if a.noise:
        parameters["noise_key"] = rng.words(seed, "noise", epoch, index, view, num=2).astype(np.int64)
    return parameters
