"""Flips and rotations of views with any number of channels.

A rotation by right angles only moves pixels: it is flips, for which the crop reads its box backwards, and then, for odd
quarters, a transposition.  A rotation by any other angle turns the resized crop about its center, bilinear.  The
corners are filled with the view mirrored at its border, as for the blur.  A constant or a stretched border would put an
edge into the view that is not in the image and that gives its angle away.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from sslx.data.backends.selection import changed, selected
from sslx.data.transfer import Arrays
from sslx.data.views import Draw, ViewSpec


def reversed_axes(drawn: Draw) -> npt.NDArray[np.bool_]:
    """Return whether the box of each sample is read backwards: (2, N), from below and from the right.

    With the transposition in ``turned``, these are both flips and then the rotation by right angles.
    """
    axes = np.zeros((2, len(drawn.flip)), dtype=np.bool_)
    axes[1] = drawn.flip > 0
    if drawn.vertical_flip is not None:
        axes[0] = drawn.vertical_flip > 0
    if drawn.quarter_turns is not None:
        axes[0] ^= drawn.quarter_turns >= 2
        axes[1] ^= (drawn.quarter_turns == 1) | (drawn.quarter_turns == 2)
    return axes


def delays_jitter(spec: ViewSpec) -> bool:
    """Return whether brightness and contrast must wait for a rotation, which changes the view's mean."""
    return spec.augment is not None and spec.augment.rotate > 0


def parameters(drawn: Draw) -> Arrays:
    """Return the arrays that ``turned`` needs on the device."""
    arrays = Arrays()
    if drawn.quarter_turns is not None:
        arrays["transposed"] = np.flatnonzero(drawn.quarter_turns % 2)
    if drawn.angle is not None:
        rows = np.flatnonzero(drawn.angle)
        radians = np.deg2rad(drawn.angle[rows].astype(np.float64))
        directions = np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)
        arrays |= {"rotated": rows, "directions": directions}
    return arrays


def turned(pixels: Tensor, drawn: Draw, part: slice, sent: Mapping[str, Tensor]) -> Tensor:
    """Transpose and rotate some views of a part of the batch, (N, C, S, S) float32, which may change in place.

    sent: ``parameters`` of the batch on the device.
    """
    if drawn.quarter_turns is not None and (drawn.quarter_turns[part] % 2).any():
        chosen, rows = selected(drawn.quarter_turns % 2, part)
        pixels = changed(pixels, part, chosen, sent["transposed"][rows], lambda views: views.mT.contiguous())
    if drawn.angle is not None and drawn.angle[part].any():
        chosen, rows = selected(drawn.angle, part)
        rotate = partial(_rotated, directions=sent["directions"][rows])
        pixels = changed(pixels, part, chosen, sent["rotated"][rows], rotate)
    return pixels


def _rotated(views: Tensor, directions: Tensor) -> Tensor:
    """Rotate views (N, C, S, S) counterclockwise about their centers, bilinear, mirrored beyond the border.

    directions: (N, 2), the cosine and the sine of each angle.
    """
    side = views.shape[-1]
    # Places from -1 to 1, the centers of the first and the last pixel.  A matrix product might depend on the batch.
    place = torch.arange(side, dtype=torch.float32, device=views.device)
    place.sub_((side - 1) / 2).mul_(2 / max(1, side - 1))
    cos, sin = directions[:, :, None, None].unbind(1)
    x, y = place[None, None, :], place[None, :, None]
    grid = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=3)
    return functional.grid_sample(views, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
