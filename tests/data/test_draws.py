"""Draws: the numbers of before, functions of the sample or of the step alone, and below 1."""

from dataclasses import replace

import numpy as np
import pytest

from sslx import rng
from sslx.data.draws import Draws


@pytest.fixture
def draws() -> Draws:
    generator = np.random.default_rng()
    index = generator.integers(0, 1 << 32, 50, dtype=np.int64)
    return Draws(seed=int(generator.integers(1 << 40)), epoch=3, batch=17, index=index)


def test_the_numbers_of_a_sample_are_those_that_methods_had_before(draws: Draws):
    before = rng.uniform(draws.seed, "method", draws.epoch, draws.index, num=19).astype(np.float32)
    numbers = draws.per_sample(19)
    assert numbers.dtype == np.float32
    assert np.array_equal(numbers, np.minimum(before, np.float32(1 - 2.0**-24)))


def test_the_numbers_of_a_sample_depend_on_seed_epoch_and_name_and_on_no_other_sample(draws: Draws):
    numbers = draws.per_sample(8)
    assert np.array_equal(replace(draws, index=draws.index[7:9], batch=99).per_sample(8), numbers[7:9])
    others = [replace(draws, epoch=4), replace(draws, seed=draws.seed + 1)]
    for other in (*(each.per_sample(8) for each in others), draws.per_sample(8, "masks")):
        assert not np.isin(numbers, other).any()


def test_the_numbers_of_a_step_are_the_same_for_all_samples_and_others_in_the_next_step(draws: Draws):
    numbers = draws.per_step(8)
    assert (numbers.shape, numbers.dtype) == ((8,), np.float32)
    assert np.array_equal(replace(draws, index=draws.index[:0], epoch=0).per_step(8), numbers)
    others = [replace(draws, batch=18), replace(draws, seed=draws.seed + 1)]
    for other in (*(each.per_step(8) for each in others), draws.per_step(8, "masks")):
        assert not np.isin(numbers, other).any()
    of_the_first_sample = replace(draws, epoch=draws.batch, index=np.zeros(1, np.int64))
    assert not np.isin(numbers, of_the_first_sample.per_sample(8)).any(), "they share counters"


def test_no_number_is_1(draws: Draws, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rng, "uniform", lambda *_, num: np.full((2, num), 1 - 2.0**-33))
    assert draws.per_sample(3).max() < 1
    assert draws.per_step(3).max() < 1
