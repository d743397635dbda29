"""Counter-based randomness, in which a draw is a pure function of (seed, name, counters).

There is no state to save, to share between ranks or to replay on a restart.  The crop of sample 17, view 1, in epoch 3
is the same on one rank and on eight, in DALI and in torchvision, and before and after a restart.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which CUDA and
NumPy have as well.  It is a keyed bijection of a 128-bit counter.  The key is a hash of seed and name.
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Counter = int | npt.NDArray[np.integer]
Words = npt.NDArray[np.uint64]
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_MURMUR = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_NUM_ROUNDS = 24
_MAX_BLOCKS = 1 << 15
"""Maximum number of blocks of four words that are computed at a time, so that their arrays stay in a core's cache."""
_MIN_SAMPLES = 256
"""Minimum number of samples that are computed at a time.  With fewer, NumPy's overhead exceeds the computation."""


def philox4x32(counter: Sequence[Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Apply ten rounds of Philox4x32.

    counter: four arrays of words < 2^32 whose shapes broadcast.  Returns four such arrays of the broadcast shape.
    The first rounds run on the smaller shapes of the counters that they have mixed so far.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high_0, high_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        low_0, low_2 = high_0 & _LOW_WORD, high_2 & _LOW_WORD
        high_0 >>= _WORD_BITS
        high_2 >>= _WORD_BITS
        c0, c1, c2, c3 = high_2 ^ (c1 ^ np.uint64(k0)), low_2, high_0 ^ (c3 ^ np.uint64(k1)), low_0
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words_on_device(keys: Tensor, num: int) -> Tensor:
    """Return random words on the device of ``keys``, the same on any device: (N, num, 4) int32, of 32 random bits each.

    keys: (N, 2) int64 words < 2^32, of which each row of the result is a function.  They are ``philox4x32`` of the
    counters (0 to num - 1, 0, first word, second word) with the key (0, 0).
    """
    multipliers = [int(multiplier) for multiplier in _MULTIPLIERS]
    c0 = torch.arange(num, device=keys.device)[None]
    c1 = torch.zeros((1, 1), dtype=torch.int64, device=keys.device)
    c2, c3 = keys[:, :1], keys[:, 1:]
    k0, k1 = 0, 0
    for _ in range(10):
        # Products wrap around at 64 bits.  What is left of their upper halves is removed where it would do harm.
        product_0, product_2 = c0 * multipliers[0], c2 * multipliers[1]
        c0, c2 = (product_2 >> 32) ^ c1, (product_0 >> 32) ^ c3
        for word, key in ((c0, k0), (c2, k1)):
            word.bitwise_xor_(key).bitwise_and_(0xFFFFFFFF)
        c1, c3 = product_2, product_0
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    pairs = torch.stack([c1.bitwise_left_shift_(32).bitwise_or_(c0), c3.bitwise_left_shift_(32).bitwise_or_(c2)], dim=2)
    return pairs.view(torch.int32)


def _key(seed: int, name: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _columns(
    seed: int, name: str, counters: Sequence[Counter], num: int, dtype: type[np.uint64] | type[np.float64]
) -> npt.NDArray[Any]:
    """Return (num, N) random 32-bit words, in which the N words of each draw are contiguous."""
    assert len(counters) <= 3
    counter_words = [np.asarray(counter, dtype=np.uint64) for counter in counters]
    assert all(word.size == 0 or int(word.max()) < 1 << 32 for word in counter_words)
    shape = np.broadcast_shapes((1,), *(word.shape for word in counter_words))
    num_blocks = -(-num // 4)
    block = np.arange(num_blocks, dtype=np.uint64).reshape(-1, *(1 for _ in shape))
    counter_words += [np.zeros((), dtype=np.uint64)] * (3 - len(counters))
    draws = np.empty((num_blocks, 4, *shape), dtype=dtype)
    step = max(_MIN_SAMPLES, _MAX_BLOCKS * shape[-1] // max(1, num_blocks * math.prod(shape)))
    for start in range(0, shape[-1], step):
        part = slice(start, start + step)
        part_words = (w[..., part] if w.ndim and w.shape[-1] > 1 else w for w in counter_words)
        for i, word in enumerate(philox4x32((block, *part_words), _key(seed, name))):
            draws[:, i, ..., part] = word
    return draws.reshape(4 * num_blocks, math.prod(shape))[:num]


def words(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.uint64]:
    """Return (N, num) random 32-bit words, one row for each element of the broadcast counters.

    counters: at most three, each < 2^32, such as epoch or step, sample index, and view.
    """
    return np.ascontiguousarray(_columns(seed, name, counters, num, np.uint64).T)


def uniform_columns(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.float64]:
    """Return the transpose of ``uniform``, (num, N), contiguous, which is faster to compute."""
    draws = _columns(seed, name, counters, num, np.float64)
    draws += 0.5
    draws *= 2.0**-32
    return draws


def uniform(seed: int, name: str, *counters: Counter, num: int) -> npt.NDArray[np.float64]:
    """Return (N, num) uniform numbers in the open interval (0, 1), with 32 random bits each."""
    return np.ascontiguousarray(uniform_columns(seed, name, *counters, num=num).T)


def permutation(seed: int, name: str, *counters: int, size: int) -> npt.NDArray[np.int64]:
    """Return a random order of ``range(size)``, (size,), which does not depend on the version of a library.

    It is the order of random 64-bit words.
    """
    halves = words(seed, name, *counters, num=2 * size)[0].reshape(size, 2)
    return np.argsort(halves[:, 0] << _WORD_BITS | halves[:, 1], kind="stable").astype(np.int64)


def permuted(
    seed: int, name: str, *counters: int, size: int, positions: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Return the numbers at the given positions of a random order of ``range(size)``, without computing the rest.

    positions: (N,) in [0, size), with 1 <= size <= 2^32.  Returns (N,) in the same range.  Memory is proportional to N,
    whatever the size.  The order differs from that of ``permutation``.

    The order is the generalized Feistel network of Black and Rogaway (Ciphers with Arbitrary Finite Domains, CT-RSA
    2002, method 3).  A position is a cell of a table that is slightly larger than ``size``.  Each round shifts every
    row by a hash of its column, or every column by a hash of its row.  A result beyond ``size`` goes through the rounds
    again (cycle walking), which keeps the mapping one to one.  There are 24 rounds, as in Mitchell et al.,
    Bandwidth-Optimal Random Shuffling for GPUs (arXiv 2106.06161), and in ``thrust::shuffle``, where 8 and 16 were too
    few.  One deviation: the number of rows is even, because a table with two odd sides gives only even permutations.
    With ideal hashes on tables of 4 and 8 cells, 24 rounds differ from uniform by at most 0.4 % in total variation, and
    8 rounds by 28 %.
    """
    assert 1 <= size <= 1 << 32
    num_rows, num_columns = _table(size)
    keys = _round_keys(seed, name, counters)
    cells = _through_rounds(positions.astype(np.uint64), num_rows, num_columns, keys)
    while len(beyond := np.flatnonzero(cells >= size)):
        cells[beyond] = _through_rounds(cells[beyond], num_rows, num_columns, keys)
    return cells.astype(np.int64)


def positions_in_permuted(
    seed: int, name: str, *counters: int, size: int, numbers: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Return the positions of the given numbers in the order of ``permuted``: its inverse, as cheap as it is.

    numbers: (N,) in [0, size).  Returns (N,) in the same range.
    """
    num_rows, num_columns = _table(size)
    keys = _round_keys(seed, name, counters)
    cells = _back_through_rounds(numbers.astype(np.uint64), num_rows, num_columns, keys)
    while len(beyond := np.flatnonzero(cells >= size)):
        cells[beyond] = _back_through_rounds(cells[beyond], num_rows, num_columns, keys)
    return cells.astype(np.int64)


@lru_cache(maxsize=64)
def _table(size: int) -> tuple[int, int]:
    """Return the numbers of rows (even) and columns of a nearly square table with few cells beyond ``size``."""
    square = math.isqrt(size - 1) + 1
    square += square % 2
    candidates = range(square, square + min(square // 4, 64) + 1, 2)
    num_rows = min(candidates, key=lambda num_rows: -size % num_rows)
    return num_rows, -(-size // num_rows)


@lru_cache(maxsize=64)
def _round_keys(seed: int, name: str, counters: tuple[int, ...]) -> Words:
    """Return (_NUM_ROUNDS,) 64-bit keys."""
    halves = words(seed, name, *counters, num=2 * _NUM_ROUNDS)[0].reshape(_NUM_ROUNDS, 2)
    return halves[:, 0] << _WORD_BITS | halves[:, 1]


def _through_rounds(cells: Words, num_rows: int, num_columns: int, keys: Words) -> Words:
    """Move cells (N,) of the table, counted column by column, through all rounds."""
    column, row = np.divmod(cells, np.uint64(num_rows))
    for i, key in enumerate(keys):
        if i % 2 == 0:
            row = _shifted(row, num_rows, column ^ key)
        else:
            column = _shifted(column, num_columns, row ^ key)
    return column * np.uint64(num_rows) + row


def _back_through_rounds(cells: Words, num_rows: int, num_columns: int, keys: Words) -> Words:
    """Undo ``_through_rounds``."""
    column, row = np.divmod(cells, np.uint64(num_rows))
    for i in reversed(range(len(keys))):
        if i % 2 == 0:
            row = _shifted_back(row, num_rows, column ^ keys[i])
        else:
            column = _shifted_back(column, num_columns, row ^ keys[i])
    return column * np.uint64(num_rows) + row


def _shifted(positions: Words, length: int, hash_input: Words) -> Words:
    """Shift positions (N,) in range(length) cyclically by a hash of ``hash_input`` (N,)."""
    shifted = positions + _shifts(length, hash_input)
    return np.minimum(shifted, shifted - np.uint64(length))  # a negative difference wraps around to a large number


def _shifted_back(positions: Words, length: int, hash_input: Words) -> Words:
    shifted = positions - _shifts(length, hash_input)
    return np.minimum(shifted, shifted + np.uint64(length))


def _shifts(length: int, hash_input: Words) -> Words:
    """Return a hash of ``hash_input`` (N,) in range(length).

    The hash is MurmurHash3's 64-bit finalizer without its first and last steps.  Only its upper bits are used, which
    depend on all input bits even so.
    """
    amount = hash_input * _MURMUR[0]
    amount ^= amount >> _WORD_BITS
    amount *= _MURMUR[1]
    amount >>= _WORD_BITS
    amount *= np.uint64(length)
    amount >>= _WORD_BITS
    return amount


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, which are used only to initialize weights (by timm and torch)."""
    torch.manual_seed(_weights_seed(seed))


@contextmanager
def initial_weights(seed: int) -> Generator[None]:
    """Draw weights on the CPU as after ``seed_torch`` inside the context, and restore torch's generators afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_weights_seed(seed))  # torch.manual_seed would also seed GPUs
        yield


class OwnGenerator(TorchDispatchMode):
    """Inside this context, what this thread draws with torch on the CPU comes from a generator of its own.

    Unlike ``initial_weights`` it does not touch torch's global generator, not even for a moment, so that other threads
    may draw meanwhile.  It is for weights that are overwritten afterwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            if "generator" not in names:
                func = getattr(func.overloadpacket, "generator", func)  # such as aten.randn.generator
                names = [argument.name for argument in func._schema.arguments]
            if "generator" in names:
                kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _weights_seed(seed: int) -> int:
    first, second = _key(seed, "initial weights")
    return first << 32 | second
