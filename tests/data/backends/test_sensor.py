"""Gain and noise: the noise against Philox in NumPy and SciPy's normal distribution, the same in any batch."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from kit.loaders import CPU
from sslx import rng
from sslx.data import views
from sslx.data.backends import row_sums
from sslx.data.backends.sensor import Sensor
from sslx.data.transfer import send
from sslx.data.views import Augment, Draw, ViewSpec

AUGMENT = Augment(gain=0.6, noise=0.6)


def spec_of(size: int, channels: int, augment: Augment = AUGMENT) -> ViewSpec:
    return ViewSpec(size=size, augment=augment, mean=(0.5,) * channels, std=(0.2,) * channels)  # pyright: ignore[reportArgumentType]


def applied(spec: ViewSpec, drawn: Draw, pixels: npt.NDArray[Any], full_scale: float = 255.0) -> Tensor:
    sensor = Sensor(spec, CPU)
    (sent,) = send([sensor.parameters(drawn)], CPU)
    return sensor(drawn, torch.from_numpy(pixels), sent, full_scale=full_scale)


def normal_numbers(key: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.float64]:
    """Eight for each counter of Philox: the quantiles at the lower and upper half of its four words."""
    block = np.arange(-(-number // 8), dtype=np.uint64)
    first, second = (np.full_like(block, word) for word in key)
    words = np.stack(rng.philox4x32((block, np.zeros_like(block), first, second), (0, 0)), axis=1)
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2).ravel()[:number]
    return stats.norm.ppf((halves + 0.5) / 65536)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_gain_per_channel_then_the_noise_of_the_samples_key(channels: int, dtype: str) -> None:
    random = np.random.default_rng()
    spec = spec_of(13, channels)
    drawn = views.draw(spec, int(random.integers(2**31)), 2, np.arange(20), 1)
    assert drawn.gain is not None
    assert drawn.noise is not None
    assert drawn.noise_key is not None
    pixels = random.integers(0, 256, (20, 13, 13, channels)).astype(dtype)
    before = pixels.copy()
    got = applied(spec, drawn, pixels).numpy()
    np.testing.assert_array_equal(pixels, before)
    assert 0 < np.count_nonzero(drawn.noise) < 20
    for row in range(20):
        want = (pixels[row] * drawn.gain[row].astype(np.float64)).clip(0, 255)
        noise = normal_numbers(drawn.noise_key[row], want.size).reshape(want.shape)
        want = (want + 255 * drawn.noise[row] * noise).clip(0, 255)
        np.testing.assert_allclose(got[row], want, atol=255 * drawn.noise[row] * 3e-4 + 1e-4)
    fractions = applied(spec, drawn, (pixels / 255).astype(np.float32), 1.0).numpy()
    np.testing.assert_allclose(255 * fractions, got, atol=1e-3)


def test_no_sample_depends_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, in parts of any size."""
    random = np.random.default_rng()
    spec = spec_of(11, 3)
    pixels = random.uniform(0, 255, (23, 11, 11, 3)).astype(np.float32)
    whole = applied(spec, views.draw(spec, 5, 1, np.arange(23), 0), pixels)
    for rows, values in ((np.arange(5, 6), 2**20), (random.permutation(23), 4 * 363), (np.arange(0, 23, 2), 363)):
        monkeypatch.setattr(row_sums, "MAX_CACHED_VALUES", values)
        assert torch.equal(applied(spec, views.draw(spec, 5, 1, rows, 0), pixels[rows]), whole[rows])


def test_noise_is_normal_and_independent_everywhere() -> None:
    """Between pixels, channels, samples, views and epochs, of the drawn deviation."""
    spec = spec_of(32, 3, Augment(noise=1, max_noise=0.1))
    gray = np.full((4, 32, 32, 3), 128, dtype=np.uint8)
    noise = list[npt.NDArray[np.float64]]()
    for epoch, view in ((0, 0), (0, 1), (1, 0)):
        drawn = views.draw(spec, np.random.default_rng().integers(2**31), epoch, np.arange(4), view)
        assert drawn.noise is not None
        values = applied(spec, drawn, gray).numpy().astype(np.float64) - 128
        inside = np.abs(values).max((1, 2, 3)) < 127
        noise += list(values[inside] / (255 * drawn.noise[inside, None, None, None]))
    assert len(noise) >= 8
    assert stats.kstest(np.concatenate(noise).ravel(), stats.norm.cdf).pvalue > 1e-4
    one = noise[0]
    shifted = [one[:, :, 0].ravel(), one[:, :, 1].ravel(), np.roll(one[:, :, 0], 1, 0).ravel()]
    shifted += [np.roll(one[:, :, 0], k, 1).ravel() for k in (1, 2, 3, 8)] + [
        other[:, :, 0].ravel() for other in noise[1:]
    ]
    correlation = np.corrcoef(np.stack(shifted)) - np.eye(len(shifted))
    assert np.abs(correlation).max() < 5 / 32


def test_without_gain_and_noise_views_are_what_they_were() -> None:
    plain = spec_of(8, 3, Augment())
    pixels = np.random.default_rng().integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    drawn = views.draw(plain, 0, 0, np.arange(2), 0)
    assert Sensor(plain, CPU).parameters(drawn) == {}
    got = applied(plain, drawn, pixels)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), pixels)
    evaluation = ViewSpec(size=8)
    assert Sensor(evaluation, CPU).parameters(None) == {}
