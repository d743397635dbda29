"""Counter-based randomness: a draw is a pure function of (seed, name, counters) and of nothing else.

There is no state to save, to share between ranks or to replay on a restart: the crop of sample 17, view 1,
in epoch 3 is the same on one rank and on eight, in DALI and in torchvision, today and after a requeue.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
one behind CUDA's and NumPy's: a keyed bijection of a 128-bit counter.  The key is a hash of seed and name.
"""

import hashlib
import math
from collections.abc import Sequence
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


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, which only the initialisation of weights (timm's, torch's own) uses."""
    first, second = _key(seed, "initial weights")
    torch.manual_seed(first << 32 | second)
