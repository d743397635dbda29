"""Counter-based randomness: a draw is a pure function of (seed, name, counters) and of nothing else.

There is no state to save, to share between ranks or to replay on a restart: the crop of sample 17, view 1,
in epoch 3 is the same on one rank and on eight, in DALI and in torchvision, today and after a requeue.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
one behind CUDA's and NumPy's: a keyed bijection of a 128-bit counter.  The key is a hash of seed and name.
"""

import hashlib
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Counter = int | npt.NDArray[np.integer]
Words = npt.NDArray[np.uint64]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MURMUR = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_NUM_ROUNDS = 24
_MOST_AT_ONCE = 1 << 15
"""Blocks of four words that are computed together: their arrays stay in a core's cache."""
_FEWEST_AT_ONCE = 256
"""Samples that are computed together all the same: below this, calling numpy takes longer than what it computes."""


def philox4x32(counter: Sequence[Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Ten rounds of Philox4x32.

    counter: four arrays of words < 2^32 whose shapes broadcast.  Returns four arrays of such words, of that shape.
    While the rounds have mixed few of the counters yet, they cost only what those few cost.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, high_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        low_0, low_2 = high_0 & _LOW, high_2 & _LOW
        high_0 >>= _HALF
        high_2 >>= _HALF
        c0, c1, c2, c3 = high_2 ^ (c1 ^ np.uint64(k0)), low_2, high_0 ^ (c3 ^ np.uint64(k1)), low_0
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _columns(
    seed: int, name: str, counters: Sequence[Counter], num: int, dtype: type[np.uint64] | type[np.float64]
) -> npt.NDArray[Any]:
    """(num, N) random 32-bit words: each draw of all N rows lies in one piece of memory."""
    assert len(counters) <= 3
    words_of_counters = [np.asarray(counter, dtype=np.uint64) for counter in counters]
    assert all(word.size == 0 or int(word.max()) < 1 << 32 for word in words_of_counters)
    shape = np.broadcast_shapes((1,), *(word.shape for word in words_of_counters))
    blocks = -(-num // 4)
    block = np.arange(blocks, dtype=np.uint64).reshape(-1, *(1 for _ in shape))
    words_of_counters += [np.zeros((), dtype=np.uint64)] * (3 - len(counters))
    drawn = np.empty((blocks, 4, *shape), dtype=dtype)
    step = max(_FEWEST_AT_ONCE, _MOST_AT_ONCE * shape[-1] // max(1, blocks * math.prod(shape)))
    for start in range(0, shape[-1], step):
        part = slice(start, start + step)
        words_of_part = (w[..., part] if w.ndim and w.shape[-1] > 1 else w for w in words_of_counters)
        for number, word in enumerate(philox4x32((block, *words_of_part), _key(seed, name))):
            drawn[:, number, ..., part] = word
    return drawn.reshape(4 * blocks, math.prod(shape))[:num]


def words(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.uint64]:
    """(N, num) random 32-bit words, one row for each element of the counters broadcast together.

    At most three counters, each < 2^32 (epoch or step, sample index, view); the fourth counts the draws.
    """
    return np.ascontiguousarray(_columns(seed, name, counters, num, np.uint64).T)


def uniform_columns(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.float64]:
    """(num, N): ``uniform`` with each draw of all N rows in one piece of memory, which is quicker to make."""
    drawn = _columns(seed, name, counters, num, np.float64)
    drawn += 0.5
    drawn *= 2.0**-32
    return drawn


def uniform(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.float64]:
    """(N, num) numbers, uniform in the open interval (0, 1), with 32 random bits each."""
    return np.ascontiguousarray(uniform_columns(seed, name, *counters, num=num).T)


def permutation(seed: int, name: str, *counters: int, size: int) -> npt.NDArray[np.int64]:
    """A random order of ``range(size)``: the ranks of 64-bit words, so that no library version changes it."""
    drawn = words(seed, name, *counters, num=2 * size)[0].reshape(size, 2)
    return np.argsort(drawn[:, 0] << _HALF | drawn[:, 1], kind="stable").astype(np.int64)


def permuted(
    seed: int, name: str, *counters: int, size: int, positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Return the numbers at these positions of a random order of ``range(size)``, without making the rest of it.

    positions: (N,) in [0, size), where 1 <= size <= 2^32.  Returns (N,) likewise.  It takes memory for N numbers and no
    more, whatever the size is.  This is another order than that of ``permutation``.

    The order is the generalized Feistel network of Black and Rogaway (Ciphers with Arbitrary Finite Domains, CT-RSA
    2002, method 3): a position is written as a cell of a table that is barely larger than ``size``; each round shifts
    every row by an amount that is a hash of its column, or the other way around; what comes out beyond ``size`` goes
    through again (cycle walking), which keeps it one to one.  There are 24 rounds, as in the bijection of Mitchell et
    al., Bandwidth-Optimal Random Shuffling for GPUs (arXiv 2106.06161), and in ``thrust::shuffle``, which had too few
    with 8 and 16.  One deviation: the number of rows is even, because a table with two odd sides would give even
    permutations only.  Computed with ideal hashes for tables of 4 and 8 cells (up to 8 samples), 24 rounds are at most
    0.4 % from uniform in total variation; 8 rounds are 28 %.
    """
    assert 1 <= size <= 1 << 32
    num_rows, num_columns = _table(size)
    keys = _round_keys(seed, name, counters)
    cells = _through_rounds(positions.astype(np.uint64), num_rows, num_columns, keys)
    while len(beyond := np.flatnonzero(cells >= size)):
        cells[beyond] = _through_rounds(cells[beyond], num_rows, num_columns, keys)
    return cells.astype(np.int64)


@lru_cache(maxsize=64)
def _table(size: int) -> tuple[int, int]:
    """(an even number of rows, number of columns) of a nearly square table that has few cells beyond ``size``."""
    square = math.isqrt(size - 1) + 1
    square += square % 2
    candidates = range(square, square + min(square // 4, 64) + 1, 2)
    num_rows = min(candidates, key=lambda num_rows: -size % num_rows)
    return num_rows, -(-size // num_rows)


@lru_cache(maxsize=64)
def _round_keys(seed: int, name: str, counters: tuple[int, ...]) -> Words:
    """(_NUM_ROUNDS,) keys of 64 bits."""
    halves = words(seed, name, *counters, num=2 * _NUM_ROUNDS)[0].reshape(_NUM_ROUNDS, 2)
    return halves[:, 0] << _HALF | halves[:, 1]


def _through_rounds(cells: Words, num_rows: int, num_columns: int, keys: Words) -> Words:
    """Move cells of the table, counted column by column, through all rounds: (N,)."""
    column, row = np.divmod(cells, np.uint64(num_rows))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            row = _shifted(row, num_rows, column ^ key)
        else:
            column = _shifted(column, num_columns, row ^ key)
    return column * np.uint64(num_rows) + row


def _shifted(places: Words, length: int, hashed: Words) -> Words:
    """``places`` in range(length), each moved around by an amount that is a hash: (N,).

    The hash is MurmurHash3's finalizer for 64 bits without its first and last steps: the bits that are used, the upper
    ones, depend on all bits all the same.
    """
    amount = hashed * _MURMUR[0]
    amount ^= amount >> _HALF
    amount *= _MURMUR[1]
    amount >>= _HALF
    amount *= np.uint64(length)
    amount >>= _HALF
    amount += places
    return np.minimum(amount, amount - np.uint64(length))  # the difference wraps around 2^64 where it is below 0


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, which only the initialisation of weights (timm's, torch's own) uses."""
    torch.manual_seed(_initial(seed))


@contextmanager
def initial_weights(seed: int) -> Generator[None]:
    """Draw weights on the CPU as after ``seed_torch``, and leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_initial(seed))  # torch.manual_seed would seed GPUs' generators too
        yield


def _initial(seed: int) -> int:
    first, second = _key(seed, "initial weights")
    return first << 32 | second
