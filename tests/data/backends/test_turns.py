"""Flips and rotations of a batch, against NumPy's and SciPy's of each view."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from kit.loaders import AS_STORED
from sslx.data import views
from sslx.data.backends import resident, turns
from sslx.data.views import Augment, ViewSpec

PLAIN = Augment(flip=0.5, jitter=0, gray=0, blur=0, min_scale=1, max_ratio=1)


def parts_of(number: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, number, step)]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("side", [8, 33])
def test_a_rotation_is_scipys_with_a_mirrored_border(channels: int, side: int) -> None:
    random = np.random.default_rng()
    spec = ViewSpec(size=side, augment=Augment(rotate=0.7, max_angle=180))
    drawn = views.draw(spec, int(random.integers(2**31)), 1, np.arange(12), 0)
    assert drawn.angle is not None
    pixels = random.uniform(0, 255, (12, channels, side, side)).astype(np.float32)
    sent = {name: torch.from_numpy(array) for name, array in turns.parameters(drawn).items()}
    for step in (12, 5):
        parts = parts_of(12, step)
        got = torch.cat([turns.turned(torch.from_numpy(pixels[part].copy()), drawn, part, sent) for part in parts])
        for view, before, degrees in zip(got.numpy(), pixels, drawn.angle.tolist(), strict=True):
            if not degrees:
                np.testing.assert_array_equal(view, before)
                continue
            y, x = np.mgrid[:side, :side] - (side - 1) / 2
            cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
            places = np.stack([x * sin + y * cos, x * cos - y * sin]) + (side - 1) / 2
            for channel, plane in zip(view, before.astype(np.float64), strict=True):
                want = ndimage.map_coordinates(plane, places, order=1, mode="mirror")
                np.testing.assert_allclose(channel, want, atol=0.05)  # places in fp32


def test_a_rotation_is_counterclockwise() -> None:
    """As NumPy's by right angles is, near which no pixel moves by a whole one."""
    pixels = torch.rand(2, 4, 16, 16)
    spec = ViewSpec(size=16, augment=Augment(rotate=1))
    drawn = views.draw(spec, 0, 0, np.arange(2), 0)
    drawn = views.Draw(**{**drawn.arrays(), "angle": np.array([90, -90], dtype=np.float32)})
    sent = {name: torch.from_numpy(array) for name, array in turns.parameters(drawn).items()}
    got = turns.turned(pixels, drawn, slice(0, 2), sent).numpy()
    np.testing.assert_allclose(got[0], np.rot90(pixels[0].numpy(), 1, (1, 2)), atol=1e-4)
    np.testing.assert_allclose(got[1], np.rot90(pixels[1].numpy(), 3, (1, 2)), atol=1e-4)


def test_flips_then_right_angles_only_move_pixels() -> None:
    """On the whole image at its own size.  Of 64 samples, all 16 combinations occur but with a chance of 0.03."""
    random = np.random.default_rng()
    pixels = torch.from_numpy(random.integers(0, 256, (64, 3, 9, 9), dtype=np.uint8)).float()
    augment = Augment(**{**vars(PLAIN), "vertical_flip": 0.5, "right_angles": 0.75})
    spec = ViewSpec(size=9, augment=augment, **AS_STORED)
    drawn = views.draw(spec, int(random.integers(2**31)), 1, np.arange(64), 0)
    assert drawn.vertical_flip is not None
    assert drawn.quarter_turns is not None
    crop = resident.Crop(spec)
    cropped = crop(drawn, pixels, crop.parameters(drawn, np.full((64, 2), 9))).permute(0, 3, 1, 2).contiguous()
    sent = {name: torch.from_numpy(array) for name, array in turns.parameters(drawn).items()}
    got = torch.cat([turns.turned(cropped[part], drawn, part, sent) for part in parts_of(64, 24)]).numpy()
    combinations = set[tuple[float, ...]]()
    for row, want in enumerate(pixels.numpy()):
        combination = (drawn.flip[row], drawn.vertical_flip[row], drawn.quarter_turns[row])
        combinations.add(combination)
        want = want[:, :, ::-1] if combination[0] else want
        want = want[:, ::-1] if combination[1] else want
        np.testing.assert_array_equal(got[row], np.rot90(want, int(combination[2]), (1, 2)), str(combination))
    assert len(combinations) > 10
