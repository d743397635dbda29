"""Rotation: the turned images against NumPy, the loss against a loop, chance and certainty."""

import math

import numpy as np
import pytest
import torch

from kit import tiny
from kit.errors import raises_one_line
from sslx.data.augment import Augment
from sslx.data.batch import Batch
from sslx.errors import ConfigError
from sslx.methods import rotation
from sslx.methods.base import Embedded


def make() -> tuple[rotation.Method, tiny.Pixels]:
    encoder = tiny.Pixels(75)
    return rotation.Method(rotation.Config(), encoder), encoder


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_each_image_goes_through_in_all_four_rotations_in_one_batch(
    format: torch.memory_format, generator: torch.Generator
):
    images = torch.randn(3, 3, 5, 5, generator=generator).contiguous(memory_format=format)
    method, encoder = make()
    logits = method.embed(Batch((images,), None, torch.arange(3))).compared
    (seen,) = encoder.seen
    assert seen.is_contiguous(memory_format=torch.channels_last)
    for k in range(4):
        for b in range(3):
            turned = np.stack([np.rot90(channel, k) for channel in images[b].numpy()])
            assert np.array_equal(seen[3 * k + b].numpy(), turned)
            torch.testing.assert_close(logits[k][b], method.head(torch.from_numpy(turned.copy()).flatten()))


@pytest.mark.parametrize("turning", [{"right_angles": 0.1}, {"vertical_flip": 0.5}, {"rotate": 1, "max_angle": 90}])
def test_views_that_are_turned_already_are_refused(turning: dict[str, float]):
    with raises_one_line(ConfigError, "which needs upright images"):
        rotation.Config().inputs(Augment(**turning), 32)  # pyright: ignore[reportArgumentType]
    assert rotation.Config().inputs(Augment(rotate=1, max_angle=15), 32).views[0].augment is not None


def test_the_loss_is_the_mean_negative_log_probability_of_the_rotation(generator: torch.Generator):
    method, _ = make()
    logits = torch.randn(4, 6, 4, dtype=torch.float64, generator=generator)
    total, right = 0.0, 0
    for k, of_rotation in enumerate(logits.tolist()):
        for row in of_rotation:
            total += math.log(sum(math.exp(x) for x in row)) - row[k]
            right += max(row) == row[k]
    step = method.loss(Embedded(logits.unbind()))
    assert step.loss.item() == pytest.approx(total / 24, rel=1e-12)
    assert step.metrics["accuracy"].item() == pytest.approx(right / 24)
    sure = method.loss(Embedded((50 * torch.eye(4)[:, None].expand(4, 6, 4)).unbind()))
    assert (sure.loss.item(), sure.metrics["accuracy"].item()) == (pytest.approx(0), 1)
