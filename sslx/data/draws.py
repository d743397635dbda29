"""Draws: random numbers for methods, the same at any world size and after any restart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslx import rng

_LARGEST = np.float32(1 - 2.0**-24)  # the largest of 2^32 numbers would round to 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The random numbers of a batch, as pure functions of these fields.

    seed: the run's seed.  epoch: the batch's epoch, or, if samples may come more than once in an epoch, the number of
    each one's pass (B,).  batch: the batch's number since the start of training, the same on
    all ranks.  index: (B,) int64, the places of this rank's samples in their source.
    """

    seed: int
    epoch: int | npt.NDArray[np.int64]
    batch: int
    index: npt.NDArray[np.int64]

    def per_sample(self, num: int, name: str = "method") -> npt.NDArray[np.float32]:
        """Return (B, num) numbers, uniform in [0, 1), as a function of the seed, the epoch and each sample's index.

        Numbers of different names are independent of each other.
        """
        return _below_one(rng.uniform(self.seed, name, self.epoch, self.index, num=num))

    def per_step(self, num: int, name: str = "method") -> npt.NDArray[np.float32]:
        """Return (num,) numbers, uniform in [0, 1), as a function of the seed and the batch: the same on all ranks."""
        return _below_one(rng.uniform(self.seed, f"{name}, per step", self.batch, num=num)[0])


Draw = Callable[[Draws], tuple[npt.NDArray[Any], ...]]
"""Turns random numbers into the arrays that a method needs, as ``Method.draw`` does."""


def nothing(_: Draws) -> tuple[npt.NDArray[Any], ...]:
    """Draw nothing, for batches that no method trains on."""
    return ()


def _below_one(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.minimum(numbers.astype(np.float32), _LARGEST)
