"""The random generator: the published vectors, and draws that depend on nothing but their counters."""

import hashlib
import math
import tracemalloc
from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
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


Order = Callable[[int, int, npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""What stands at the given positions, from a size and an epoch."""
Statistic = Callable[[Order], float]
"""How far orders are from random ones, in standard deviations."""


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


@pytest.mark.parametrize(("num_rows", "num"), [(1, 1), (1, 300), (5, 37)])
def test_words_on_a_device_are_those_of_plain_integers(num_rows: int, num: int) -> None:
    """Of extreme keys, too, for which a sign or an upper half could be left over."""
    keys = np.random.default_rng().integers(2**32, size=(num_rows, 2))
    keys[-1] = 2**32 - 1
    drawn = rng.words_on_device(torch.from_numpy(keys), num).numpy().view(np.uint32)
    assert drawn.shape == (num_rows, num, 4)
    for row, block in np.ndindex(num_rows, num):
        expected = philox_in_plain_integers((block, 0, *keys[row].tolist()), (0, 0))
        assert drawn[row, block].tolist() == expected


def test_more_rows_than_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.random.default_rng().integers(2**32, size=1000)
    view = np.arange(3)[:, None]
    whole = rng.words(7, "crop", 4, index, view, num=9)
    monkeypatch.setattr(rng, "_MAX_BLOCKS", 1)
    monkeypatch.setattr(rng, "_MIN_SAMPLES", 7)
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


def test_permutation() -> None:
    first, second = (rng.permutation(5, "order", epoch, size=1000) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(1000))
    assert sorted(second.tolist()) == list(range(1000))
    assert (first == second).sum() < 20
    assert (first == np.arange(1000)).sum() < 20
    assert (first == rng.permutation(5, "order", 0, size=1000)).all()


@pytest.mark.parametrize("size", [*range(1, 70), *(2**k + d for k in (7, 8, 10, 16) for d in (-1, 0, 1)), 99_991])
def test_permuted_is_a_permutation(size: int) -> None:
    seed, epoch = (int(number) for number in np.random.default_rng().integers(2**32, size=2))
    for counters in ((), (epoch,), (epoch, 1)):
        order = rng.permuted(seed, "order", *counters, size=size, positions=np.arange(size))
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(size))


def test_permuted_is_a_function_of_the_position() -> None:
    random = np.random.default_rng()
    order = rng.permuted(5, "order", 3, size=1000, positions=np.arange(1000))
    some = random.integers(1000, size=300)
    assert (rng.permuted(5, "order", 3, size=1000, positions=some) == order[some]).all()
    assert (rng.permuted(5, "order", 3, size=1000, positions=some[:0]) == order[:0]).all()
    for other in (("order", 4), ("other", 3)):
        assert (rng.permuted(5, *other, size=1000, positions=np.arange(1000)) == order).mean() < 0.02


def test_no_version_permutes_otherwise() -> None:
    """Recorded when it was new: a resumed run must go on in its order."""
    positions = np.arange(0, 10**9, 10**9 // 300)
    assert digest(rng.permuted(7, "digest", 3, size=10**9, positions=positions)) == "4d2006fbfc1a4ac6"


@pytest.mark.parametrize("size", [10**9, 2**32])
def test_permuted_takes_memory_for_its_positions_only(size: int) -> None:
    positions = np.arange(size - 4096, size)
    tracemalloc.start()
    order = rng.permuted(5, "order", 3, size=size, positions=positions)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(order.tolist())) == 4096
    assert 0 <= order.min() <= order.max() < size
    assert peak_bytes < 2**20


def permuted(size: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return rng.permuted(11, "statistics", epoch, size=size, positions=positions)


def of_numpy(size: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    random = np.random.default_rng([11, epoch])
    if size < 10**6:
        return random.permutation(size)[positions]
    return random.choice(size, len(positions), replace=False)


def of_rounds(num: int) -> Order:
    """``permuted`` with fewer rounds: a planted bug."""

    def order(size: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        keys = rng._round_keys(11, "statistics", (epoch,))[:num]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rng, "_round_keys", lambda *_: keys)
            return permuted(size, epoch, positions)

    return order


def affine(size: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """i * a + b modulo the size, for random a and b of each epoch: a planted bug."""
    a, b = np.random.default_rng([11, epoch]).integers(size, size=2).tolist()
    while math.gcd(a, size) != 1:
        a += 1
    return (positions * a + b) % size


def same(size: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:  # noqa: ARG001
    """The same order in every epoch: a planted bug."""
    return permuted(size, 0, positions)


@cache
def orders(order: Order, size: int, num_epochs: int) -> npt.NDArray[np.int64]:
    """(num_epochs, size): what stands where in each epoch."""
    return np.stack([order(size, epoch, np.arange(size)) for epoch in range(num_epochs)])


def chi_squared(counts: npt.NDArray[np.int64]) -> float:
    """How far counts are from equal, in standard deviations of the statistic."""
    freedom, expected = counts.size - 1, counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def of_a_poisson(counts: npt.NDArray[np.int64], mean: float) -> float:
    """How far the mean or, if it is farther, the variance of counts is from a Poisson distribution's, likewise."""
    of_mean = (counts.mean() - mean) / math.sqrt(mean / len(counts))
    of_variance = (counts.var() - mean) / math.sqrt((mean + 2 * mean**2) / len(counts))
    return max(abs(of_mean), abs(of_variance))


def of_correlations(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> float:
    """How far the mean or the mean square of the correlations of rows is from those of independent rows, likewise."""
    a, b = ((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) for x in (left, right))
    z = (a * b).mean(axis=1) * math.sqrt(left.shape[1])
    return float(max(abs(z.mean()) * math.sqrt(len(z)), abs((z**2).mean() - 1) * math.sqrt(len(z) / 2)))


def whole_orders(order: Order) -> float:
    """Whether each of the 24 orders of four samples, and of the 120 of five, is as frequent as any other."""
    scores = list[float]()
    for size in (4, 5):
        codes = (orders(order, size, 1000) * size ** np.arange(size)).sum(axis=1)
        numbers = {sum(x * size**i for i, x in enumerate(one)): n for n, one in enumerate(permutations(range(size)))}
        counts = np.bincount([numbers[code] for code in codes.tolist()], minlength=math.factorial(size))
        scores.append(chi_squared(counts))
    return max(map(abs, scores))


def places(order: Order) -> float:
    """Whether each sample comes at each position equally often."""
    scores = list[float]()
    for size in (3, 16):
        drawn = orders(order, size, 1000)
        counts = np.bincount((drawn + size * np.arange(size)).ravel(), minlength=size**2)
        expected = counts.mean()
        statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size  # rows and columns sum to 1,000
        scores.append((statistic - (size - 1) ** 2) / math.sqrt(2) / (size - 1))
    return max(map(abs, scores))


def fixed_points(order: Order) -> float:
    """Whether one sample on average stays at its own place, and no more than by chance in any epoch."""
    return of_a_poisson((orders(order, 1000, 400) == np.arange(1000)).sum(axis=1), 1.0)


def neighbors(order: Order) -> float:
    """Whether two pairs of samples on average stay neighbors, likewise."""
    return of_a_poisson((np.abs(np.diff(orders(order, 1000, 400), axis=1)) == 1).sum(axis=1), 2.0)


def steps(order: Order) -> float:
    """Whether the step from a sample to the next one is as often of one length as of any other."""
    drawn = orders(order, 1000, 400)
    counts = [np.bincount(one * 20 // 1000, minlength=20) for one in np.diff(drawn, axis=1) % 1000]
    of_epochs = np.mean([chi_squared(one) for one in counts]) * math.sqrt(len(counts))
    return max(abs(of_epochs), abs(chi_squared(np.sum(counts, axis=0))), of_correlations(drawn[:, 1:], drawn[:, :-1]))


def between_epochs(order: Order) -> float:
    """Whether one epoch's order tells nothing of another's."""
    drawn = orders(order, 1000, 400)
    return max(of_correlations(drawn[distance:], drawn[:-distance]) for distance in (1, 2, 7))


def of_a_billion(order: Order) -> float:
    """Whether pieces of a long order are spread evenly, in their upper and lower digits, alone and in pairs."""
    size, scores = 10**9, list[float]()
    for epoch, start in enumerate((0, 5 * 10**8 - 2000, size - 20_000)):
        drawn = order(size, epoch, np.arange(start, start + 20_000))
        upper, lower = drawn // (size // 16), drawn % 16
        step = np.diff(drawn) % size // (size // 16)
        digits = [upper, lower, step, upper[1:] * 16 + upper[:-1], lower[1:] * 16 + lower[:-1], upper * 16 + lower]
        scores += [chi_squared(np.bincount(digit, minlength=256 if digit.max() > 15 else 16)) for digit in digits]
    return max(map(abs, scores))


STATISTICS: dict[Statistic, list[Order]] = {
    whole_orders: [of_rounds(1), of_rounds(4), affine, same],
    places: [of_rounds(1), same],
    fixed_points: [of_rounds(1), affine],
    neighbors: [of_rounds(1), affine],
    steps: [of_rounds(1), affine],
    between_epochs: [of_rounds(1), same],
    of_a_billion: [of_rounds(1), of_rounds(2), affine],
}
WIDEST = 5.0
"""Standard deviations: numpy's orders and ours stay within them; the draws are fixed."""


@pytest.mark.parametrize("statistic", STATISTICS)
def test_permuted_is_as_random_as_numpys_permutation(statistic: Statistic) -> None:
    """And a weak order, which the same statistic must find, is far from it."""
    assert statistic(of_numpy) < WIDEST
    assert statistic(permuted) < WIDEST
    for weak in STATISTICS[statistic]:
        assert statistic(weak) > 4 * WIDEST, weak.__qualname__


def test_seed_torch() -> None:
    drawn: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        rng.seed_torch(seed)
        drawn.append(torch.randn(8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
