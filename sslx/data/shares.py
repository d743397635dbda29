"""The order of an epoch whose samples are seen with different weights, such as those of several folders.

A share of n samples with weight w gives m = round(w n) of the epoch's samples.  They go on where those of the epoch
before ended: the share is passed through in a new order each time, without repeating a sample before all others have
come.  So weight 2 is two whole passes an epoch, and with weight 0.5 two epochs make one pass.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.data.facts import Share

Indices = npt.NDArray[np.int64]


class Weighted:
    """The samples of an epoch, each as a function of (seed, epoch, position) alone."""

    def __init__(self, seed: int, epoch: int, shares: Sequence[Share]) -> None:
        self._seed, self._epoch = seed, epoch
        self._lengths = [share.num_samples for share in shares]
        self._starts = [sum(self._lengths[:number]) for number in range(len(shares))]
        self._per_epoch = [share.num_per_epoch for share in shares]
        self._first = np.cumsum([0, *self._per_epoch])  # of each share the number of its first draw in the epoch
        self.num_samples = int(self._first[-1])

    def samples(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return the samples at these positions of the epoch, (N,), and the number of each one's pass, (N,).

        A sample comes once in each pass over its share, so that sample and pass together come once in all training.
        """
        draws = rng.permuted(self._seed, "sample order", self._epoch, size=self.num_samples, positions=positions)
        share_of = np.searchsorted(self._first, draws, side="right") - 1
        samples, passes = np.empty_like(positions), np.empty_like(positions)
        for share in np.unique(share_of).tolist():
            in_share = np.flatnonzero(share_of == share)
            since_start = self._epoch * self._per_epoch[share] + draws[in_share] - self._first[share]
            passes[in_share], places = np.divmod(since_start, self._lengths[share])
            for number in np.unique(passes[in_share]).tolist():
                in_pass = passes[in_share] == number
                samples[in_share[in_pass]] = self._starts[share] + rng.permuted(
                    self._seed, "share order", share, number, size=self._lengths[share], positions=places[in_pass]
                )
        return samples, passes

    def positions(self, sample: int) -> tuple[Indices, Indices]:
        """Return the positions of a sample in the epoch, (K,), and the numbers of its passes, (K,)."""
        share = int(np.searchsorted(self._starts, sample, side="right")) - 1
        length, count = self._lengths[share], self._per_epoch[share]
        first = self._epoch * count
        passes, draws = list[int](), list[int]()
        for number in range(first // length, (first + count - 1) // length + 1):
            place = rng.positions_in_permuted(
                self._seed, "share order", share, number, size=length, numbers=np.array([sample - self._starts[share]])
            )
            if 0 <= (draw := number * length + int(place[0]) - first) < count:
                passes.append(number)
                draws.append(draw + int(self._first[share]))
        positions = rng.positions_in_permuted(
            self._seed, "sample order", self._epoch, size=self.num_samples, numbers=np.array(draws, dtype=np.int64)
        )
        return positions, np.array(passes, dtype=np.int64)
