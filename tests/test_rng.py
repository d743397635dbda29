"""The random generator: the published vectors, and draws that depend on nothing but their counters."""

import numpy as np
import pytest
import torch

from sslx import rng

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, output of philox4x32-10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = _hex(key)
    drawn = rng.philox4x32(np.array(_hex(counter), dtype=np.uint64)[:, None], (k0, k1))
    assert drawn[:, 0].tolist() == _hex(expected)


def test_uniform_is_uniform_and_open() -> None:
    drawn = rng.uniform(3, "test", np.arange(20_000), num=5).ravel()
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    chi2 = ((counts - 1000.0) ** 2 / 1000).sum()
    assert 60 < chi2 < 150  # 99 degrees of freedom: beyond these with a chance of 1e-3; the draw is fixed


@pytest.mark.parametrize("other", ["seed", "name", "epoch", "view", "index", "draw"])
def test_draws_that_differ_in_one_thing_are_independent(other: str) -> None:
    index = np.arange(40_000)
    base = rng.uniform(1, "crop", 2, index, 0, num=2)[:, 0]
    changed = {
        "seed": rng.uniform(2, "crop", 2, index, 0, num=2)[:, 0],
        "name": rng.uniform(1, "color", 2, index, 0, num=2)[:, 0],
        "epoch": rng.uniform(1, "crop", 3, index, 0, num=2)[:, 0],
        "view": rng.uniform(1, "crop", 2, index, 1, num=2)[:, 0],
        "index": rng.uniform(1, "crop", 2, index + 1, 0, num=2)[:, 0],
        "draw": rng.uniform(1, "crop", 2, index, 0, num=2)[:, 1],
    }[other]
    assert abs(np.corrcoef(base, changed)[0, 1]) < 4 / np.sqrt(len(index))
    assert not (base == changed).any()


def test_a_part_of_the_samples_draws_what_it_draws_in_the_whole() -> None:
    whole = rng.words(7, "crop", 4, np.arange(1000), 1, num=9)
    some = np.random.default_rng().permutation(1000)[:100]
    assert (rng.words(7, "crop", 4, some, 1, num=9) == whole[some]).all()
    assert (rng.words(7, "crop", 4, int(some[0]), 1, num=9) == whole[some[:1]]).all()


def test_more_draws_begin_with_the_fewer() -> None:
    assert (rng.words(7, "a", 4, num=11)[:, :6] == rng.words(7, "a", 4, num=6)).all()


def test_permutation() -> None:
    first, second = (rng.permutation(5, "order", epoch, size=1000) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(1000))
    assert sorted(second.tolist()) == list(range(1000))
    assert (first == second).sum() < 20
    assert (first == np.arange(1000)).sum() < 20
    assert (first == rng.permutation(5, "order", 0, size=1000)).all()


def test_seed_torch() -> None:
    drawn: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        rng.seed_torch(seed)
        drawn.append(torch.randn(8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
