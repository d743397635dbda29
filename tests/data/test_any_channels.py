"""The draws of vertical flip, rotations, gain and noise: functions of their counters, apart from all other draws."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from kit.errors import raises_one_line
from sslx.data import views
from sslx.data.views import Augment, Draw, ViewSpec
from sslx.errors import ConfigError

MANY = np.arange(20_000)
PLAIN = Augment(solarize=0.2)
ALL: dict[str, Any] = {"vertical_flip": 0.3, "right_angles": 0.6, "rotate": 0.7, "gain": 0.4, "noise": 0.5}
NEEDED = {
    "vertical_flip": {"vertical_flip"},
    "right_angles": {"quarter_turns"},
    "rotate": {"angle"},
    "gain": {"gain"},
    "noise": {"noise", "noise_key"},
}


def drawn(augment: Augment, index: npt.NDArray[np.int64] = MANY, channels: int = 3, view: int = 1) -> Draw:
    spec = ViewSpec(size=64, augment=augment, mean=(0.5,) * channels, std=(0.2,) * channels)  # pyright: ignore[reportArgumentType]
    return views.draw(spec, 7, 3, index, view)


def test_each_operation_draws_by_itself_and_moves_no_other_draw() -> None:
    plain, every = drawn(PLAIN).arrays(), drawn(replace(PLAIN, **ALL)).arrays()
    assert every.keys() - plain.keys() == set().union(*NEEDED.values())
    for operation, names in NEEDED.items():
        alone = drawn(replace(PLAIN, **{operation: ALL[operation]})).arrays()
        assert alone.keys() - plain.keys() == names
        for name, array in alone.items():
            np.testing.assert_array_equal(array, every[name], err_msg=name)
            if name in plain:
                np.testing.assert_array_equal(array, plain[name], err_msg=name)


def test_they_are_functions_of_seed_epoch_sample_and_view() -> None:
    random = np.random.default_rng()
    seed, epoch = (int(x) for x in random.integers(2**32, size=2))
    index = random.integers(2**32, size=40)
    specs = [ViewSpec(size=32, augment=replace(PLAIN, **dict.fromkeys(ALL, 1.0)))] * 3
    batch = views.draws(specs, seed, epoch, index)
    for view, together in enumerate(batch):
        assert together is not None
        rows = random.permutation(40)[:7]
        alone = views.draw(specs[view], seed, epoch, index[rows], view).arrays()
        for name, array in together.arrays().items():
            np.testing.assert_array_equal(alone[name], array[rows], err_msg=name)
            np.testing.assert_array_equal(together.row(5).arrays()[name], array[5:6])
        others = [views.draw(specs[0], *place) for place in (
            (seed + 1, epoch, index, view), (seed, epoch + 1, index, view), (seed, epoch, index, view + 1)
        )]  # fmt: skip
        for other in others:
            for name in ("angle", "gain", "noise", "noise_key"):
                assert (other.arrays()[name] != together.arrays()[name]).all(), name
    assert all(len(array) == 0 for array in drawn(replace(PLAIN, **ALL), MANY[:0]).arrays().values())


def test_a_channels_factors_do_not_depend_on_the_number_of_channels() -> None:
    recipe = Augment(gain=0.5, noise=0.5)
    three, seven = drawn(recipe, channels=3), drawn(recipe, channels=7)
    assert three.gain is not None
    assert seven.gain is not None
    assert (three.gain.shape, seven.gain.shape) == ((20_000, 3), (20_000, 7))
    np.testing.assert_array_equal(three.gain, seven.gain[:, :3])
    np.testing.assert_array_equal(three.arrays()["noise_key"], seven.arrays()["noise_key"])


def test_numbers_are_uniform_in_their_ranges_and_independent() -> None:
    d = drawn(replace(PLAIN, **ALL, max_angle=70, gain_strength=0.3, max_noise=0.2), channels=4).arrays()
    flipped, quarters, angle, gain, deviation = (
        d[name] for name in ("vertical_flip", "quarter_turns", "angle", "gain", "noise")
    )
    counts = [(flipped == 1).sum(), *((quarters == k).sum() for k in range(4)), (angle != 0).sum()]
    counts += [(gain != 1).any(1).sum(), (deviation > 0).sum()]
    probabilities = [0.3, 0.4, 0.2, 0.2, 0.2, 0.7, 0.4, 0.5]
    for count, probability in zip(counts, probabilities, strict=True):
        assert stats.binomtest(int(count), len(MANY), probability).pvalue > 1e-4, (count, probability)
    changed = gain[(gain != 1).any(1)]
    assert (changed != 1).all(), "a gain changes every channel"
    for values, low, high in (
        (angle[angle != 0], -70, 70), (deviation[deviation > 0], 0, 0.2), *((c, 0.7, 1.3) for c in changed.T)
    ):  # fmt: skip
        assert low <= values.min() < values.max() <= high
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4
    assert drawn(Augment(gain=1, gain_strength=2.5)).arrays()["gain"].min() >= 0, "no channel turns negative"
    always = drawn(Augment(**dict.fromkeys(ALL, 1.0), jitter=1), channels=4).arrays()
    columns = [always[name].reshape(len(MANY), -1) for name in ("place", "brightness", "angle", "gain", "noise")]
    table = np.concatenate([*columns, quarters[:, None], flipped[:, None], always["noise_key"] / 2**32], axis=1)
    correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(MANY))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        *(({name: p}, f"augment.{name} must be a probability in [0, 1]") for name in ALL for p in (1.1, -1, np.nan)),
        *(({"max_angle": angle}, "above 0 and at most 180 degrees, not") for angle in (0, -3, 181, np.nan)),
        *(({"gain_strength": s}, "augment.gain_strength must be a number of at least 0") for s in (-1, np.inf, np.nan)),
        *(({"max_noise": n}, "augment.max_noise must be a fraction of full scale in [0, 1]") for n in (-1, 2, np.nan)),
    ],
)
def test_what_cannot_be_is_one_line(wrong: dict[str, Any], words: str) -> None:
    with raises_one_line(ConfigError, words, str(*wrong.values())):
        Augment(**wrong)
