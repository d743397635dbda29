"""Rotation: the turned images against NumPy, the loss against a loop, chance and certainty."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sslx import encoders
from sslx.data.batch import Batch
from sslx.data.views import Augment
from sslx.methods import rotation

NOW = torch.zeros(())


class Pixels(encoders.Encoder):
    """An encoder whose features are the pixels, and which keeps what it was given."""

    def __init__(self, dim: int) -> None:
        super().__init__(torch.nn.Flatten(), dim, encoders.Recipe(name="pixels", size=8))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


def batch(images: Tensor) -> Batch:
    return Batch((images,), None, torch.arange(len(images)))


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_each_image_goes_through_in_all_four_rotations_in_one_batch(
    format: torch.memory_format, generator: torch.Generator
):
    images = torch.randn(3, 3, 5, 5, generator=generator).contiguous(memory_format=format)
    method = rotation.Method(rotation.Config(), Pixels(75))
    embedded = method.embed(batch(images))
    assert isinstance(method.encoder, Pixels)
    (seen,) = method.encoder.seen
    assert seen.is_contiguous(memory_format=torch.channels_last)
    for k in range(4):
        for b in range(3):
            turned = np.stack([np.rot90(channel, k) for channel in images[b].numpy()])
            assert np.array_equal(seen[3 * k + b].numpy(), turned)
            logits = method.head(torch.from_numpy(turned.copy()).flatten())
            torch.testing.assert_close(embedded[k][b], logits)


def test_the_loss_is_the_mean_negative_log_probability_of_the_rotation(generator: torch.Generator):
    method = rotation.Method(rotation.Config(), Pixels(75))
    logits = torch.randn(4, 6, 4, dtype=torch.float64, generator=generator)
    total, right = 0.0, 0
    for k, of_rotation in enumerate(logits.tolist()):
        for row in of_rotation:
            total += math.log(sum(math.exp(x) for x in row)) - row[k]
            right += max(row) == row[k]
    step = method.loss(tuple(logits), NOW)
    assert step.loss.item() == pytest.approx(total / 24, rel=1e-12)
    assert step.metrics["accuracy"].item() == pytest.approx(right / 24)
    sure = method.loss(tuple(50 * torch.eye(4)[:, None].expand(4, 6, 4)), NOW)
    assert (sure.loss.item(), sure.metrics["accuracy"].item()) == (pytest.approx(0), 1)


def test_parts_of_a_batch_put_together_are_the_batch(generator: torch.Generator):
    """Gradient caching joins what ``embed`` returned for each micro-batch."""
    method = rotation.Method(rotation.Config(), Pixels(75))
    parts = [method.embed(batch(torch.randn(n, 3, 5, 5, generator=generator))) for n in (2, 4)]
    joined = method.loss(tuple(map(torch.cat, zip(*parts, strict=True))), NOW).loss
    one, two = (method.loss(part, NOW).loss for part in parts)
    torch.testing.assert_close(joined, (2 * one + 4 * two) / 6)


def test_one_view():
    (view,) = rotation.views(rotation.Config(), Augment(min_scale=0.3), 48)
    assert (view.size, view.augment) == (48, Augment(min_scale=0.3))
