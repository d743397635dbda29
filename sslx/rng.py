"""Counter-based randomness: a draw is a pure function of (seed, name, counters) and of nothing else.

There is no state to save, to share between ranks or to replay on a restart: the crop of sample 17, view 1,
in epoch 3 is the same on one rank and on eight, in DALI and in torchvision, today and after a requeue.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the
one behind CUDA's and NumPy's: a keyed bijection of a 128-bit counter.  The key is a hash of seed and name.
"""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

Counter = int | npt.NDArray[np.integer]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint64], key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox4x32.  counter: (4, N), each word < 2^32; returns (4, N), likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (b >> _HALF) ^ c1 ^ np.uint64(k0),
            b & _LOW,
            (a >> _HALF) ^ c3 ^ np.uint64(k1),
            a & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.uint64]:
    """(N, num) random 32-bit words, one row for each element of the counters broadcast together.

    At most three counters, each < 2^32 (epoch or step, sample index, view); the fourth counts the draws.
    """
    assert len(counters) <= 3
    given = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counters)) if counters else []
    rows = given[0].size if given else 1
    blocks = -(-num // 4)
    counter = np.zeros((4, rows, blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    for word, values in zip(counter[1:], given, strict=False):
        assert values.size == 0 or int(values.max()) < 1 << 32
        word[:] = values.reshape(-1, 1)
    drawn = philox4x32(counter.reshape(4, -1), _key(seed, name))
    return drawn.reshape(4, rows, blocks).transpose(1, 2, 0).reshape(rows, -1)[:, :num]


def uniform(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.float64]:
    """(N, num) numbers, uniform in the open interval (0, 1), with 32 random bits each."""
    return (words(seed, name, *counters, num=num).astype(np.float64) + 0.5) * 2.0**-32


def permutation(seed: int, name: str, *counters: int, size: int) -> npt.NDArray[np.int64]:
    """A random order of ``range(size)``: the ranks of 64-bit words, so that no library version changes it."""
    drawn = words(seed, name, *counters, num=2 * size)[0].reshape(size, 2)
    return np.argsort(drawn[:, 0] << _HALF | drawn[:, 1], kind="stable").astype(np.int64)


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
