"""The random generator: the published vectors, and draws that depend on nothing but their counters."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sslx import rng

KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key, output of philox4x32-10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def digest(array: npt.NDArray[Any]) -> str:
    """Of an array's type, shape and bytes."""
    description = str((array.dtype.str, array.shape)).encode()
    return hashlib.sha256(description + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    k0, k1 = _hex(key)
    drawn = rng.philox4x32(np.array(_hex(counter), dtype=np.uint64)[:, None], (k0, k1))
    assert [int(word[0]) for word in drawn] == _hex(expected)


def philox_in_plain_integers(counter: Sequence[int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as Salmon et al. define it (SC 2011, section 3.3), of one counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, low_0 = divmod(c0 * 0xD2511F53, 2**32)
        high_2, low_2 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("num_rows", "num_views", "num"), [(1, 1, 3), (7, 1, 32), (300, 2, 9), (2, 5, 4), (1, 3, 130)])
def test_words_are_those_of_plain_integers(num_rows: int, num_views: int, num: int) -> None:
    """However many rows, views and draws are computed at once, and whichever of the counters are constant."""
    random = np.random.default_rng()
    seed, epoch = (int(number) for number in random.integers(2**32, size=2))
    index, view = random.integers(2**32, size=num_rows), random.integers(2**32, size=num_views)
    drawn = rng.words(seed, "test", epoch, index, view[:, None], num=num).reshape(num_views, num_rows, num)
    key = rng._key(seed, "test")
    for row, column in random.integers((num_views, num_rows), size=(20, 2)):
        counters = [(block, epoch, int(index[column]), int(view[row])) for block in range(-(-num // 4))]
        expected = [word for counter in counters for word in philox_in_plain_integers(counter, key)]
        assert drawn[row, column].tolist() == expected[:num]


def test_more_rows_than_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.random.default_rng().integers(2**32, size=1000)
    view = np.arange(3)[:, None]
    whole = rng.words(7, "crop", 4, index, view, num=9)
    monkeypatch.setattr(rng, "_MOST_AT_ONCE", 1)
    monkeypatch.setattr(rng, "_FEWEST_AT_ONCE", 7)
    assert (rng.words(7, "crop", 4, index, view, num=9) == whole).all()


def test_uniform_columns_are_uniform_transposed() -> None:
    index = np.random.default_rng().integers(2**32, size=100)
    rows = rng.uniform(7, "crop", 4, index, num=9)
    columns = rng.uniform_columns(7, "crop", 4, index, num=9)
    assert columns.flags.c_contiguous
    assert rows.flags.c_contiguous
    assert (rows == columns.T).all()
    assert (rows == (rng.words(7, "crop", 4, index, num=9) + 0.5) / 2**32).all()
    assert rng.uniform(7, "crop", 4, index[:0], num=9).shape == (0, 9)


def test_no_version_draws_other_numbers() -> None:
    """Digests recorded at commit f84354d: a resumed run must draw what it drew before."""
    index = np.arange(300) * 14_000_029
    assert digest(rng.words(7, "digest", 3, index, 2, num=33)) == "add9ffbd36f33ea3"
    assert digest(rng.uniform(7, "digest", 3, index, num=9)) == "69101cd455c717e9"
    assert digest(rng.permutation(7, "digest", 3, size=1001)) == "7ed222e9186e926b"


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
