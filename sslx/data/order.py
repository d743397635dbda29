"""The sampler: this rank's samples of batch number t, as a function of (seed, t)."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sslx import rng
from sslx.console.words import plural
from sslx.data.facts import Share
from sslx.data.shares import Weighted
from sslx.errors import ConfigError

Indices = npt.NDArray[np.int64]
VERSION = 2
"""Version of the function from (seed, epoch, position) to a sample.  Checkpoints of sslx 0.1 (version 1) lack it."""
_NUM_RECENT = 16
"""Batches to keep: the backend asks for each batch first, some of them ahead of time, and then the loader does."""


class Order(Protocol):
    """The samples of one rank's batches, as a function of the batch number t alone.

    A loader's position is therefore one number, and a backend that reads ahead may ask for any t.  Orders are pickled
    for the processes that read images.
    """

    @property
    def num_batches(self) -> int:
        """This rank's number of batches per epoch."""
        ...

    @property
    def per_rank(self) -> int:
        """The maximum number of this rank's samples in a batch."""
        ...

    def epoch(self, t: int) -> int:
        """Return the epoch of batch t."""
        ...

    def passes(self, t: int) -> int | Indices:
        """Return what tells apart the times that a sample of batch t is seen, on which its augmentations depend.

        It is the epoch, or, if a sample may come several times in an epoch, the number of each one's pass: (per_rank,).
        """
        ...

    def batch(self, t: int) -> Indices:
        """Return this rank's sample indices of batch t: (per_rank,) or fewer."""
        ...

    def finished(self, t: int) -> bool:
        """Return whether the order ends before batch t."""
        ...

    def state(self, t: int) -> dict[str, Any]:
        """Return the plain data by which a checkpoint finds batch t again."""
        ...

    def seek(self, state: Mapping[str, Any]) -> int:
        """Return the t whose ``state(t)`` this is, perhaps at another world size.  Raises ConfigError if none is."""
        ...


def _no_batches() -> "deque[tuple[int, Indices, int | Indices]]":
    return deque(maxlen=_NUM_RECENT)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shuffled:
    """Endless training batches: every epoch is a permutation of all samples, without the incomplete last batch.

    The permutation is global and each rank takes its contiguous share of each batch, so batch t holds the same
    samples at every world size, and a restart needs only t.  Each position of the permutation is computed
    independently (``rng.permuted``), so memory does not grow with the number of samples.

    num_samples: number of samples in the source.  batch_size: global batch size of one optimizer step.  accumulate:
    number of micro-batches per step; *batch* below means one micro-batch.  blocks: (num_blocks,) the first sample of
    each block that is best read as a whole (a tar file, a row group of a Parquet file), ascending from 0; None if all
    samples can be read equally fast.  window: the number of blocks that are mixed.  Each epoch permutes the blocks and
    then the samples inside each window of this many blocks, so that a batch no larger than a window touches the blocks
    of at most two windows.  shares: the samples' shares, if they are not all seen once in an epoch (``shares``).
    Raises ConfigError for a batch that cannot be divided or filled, and ValueError for impossible blocks or windows.
    """

    num_samples: int
    batch_size: int
    accumulate: int = 1
    seed: int
    rank: int = 0
    world_size: int = 1
    blocks: Indices | None = None
    window: int = 16
    shares: tuple[Share, ...] | None = None
    _recent: deque[tuple[int, Indices, int | Indices]] = field(default_factory=_no_batches, repr=False)
    _windows: "dict[int, _Windows]" = field(default_factory=dict[int, "_Windows"], repr=False)

    def __post_init__(self) -> None:
        if self.blocks is not None:
            _check_blocks(self.blocks, self.window, self.num_samples)
        if self.shares and (self.blocks is not None or sum(s.num_samples for s in self.shares) != self.num_samples):
            raise ValueError("shares must add up to all samples, which must not lie in blocks")
        share = self.accumulate * self.world_size
        if self.batch_size % share:
            raise ConfigError(
                f"batch size {self.batch_size} must be divisible by ranks x accumulation steps = "
                f"{self.world_size} x {self.accumulate}: take --batch-size {max(1, self.batch_size // share) * share}"
            )
        if self.num_per_epoch < self.batch_size:
            # A batch needs two images per rank and micro-batch, so that they can be told apart.
            max_batch_size, min_batch_size = self.num_per_epoch // share * share, 2 * share
            of_what = "an epoch" if self.shares else "the source"
            if max_batch_size < min_batch_size:
                raise ConfigError(
                    f"{of_what} has {plural(self.num_per_epoch, 'image')}, too few to train on: "
                    f"a batch of this run needs {min_batch_size} or more (check --source.root)"
                )
            raise ConfigError(
                f"batch size {self.batch_size} is more than the {self.num_per_epoch} images of {of_what}: "
                f"take --batch-size {max_batch_size} or less"
            )

    @property
    def num_per_epoch(self) -> int:
        """The number of samples in an epoch, of which the last ones may not fill a batch."""
        return sum(share.num_per_epoch for share in self.shares) if self.shares else self.num_samples

    @property
    def num_batches(self) -> int:
        """The number of micro-batches per epoch."""
        return self.num_per_epoch // self.batch_size * self.accumulate

    @property
    def per_rank(self) -> int:
        """The number of samples per micro-batch on one rank."""
        return self._micro_batch_size // self.world_size

    def epoch(self, t: int) -> int:
        return t // self.num_batches

    def batch(self, t: int) -> Indices:
        """Return this rank's sample indices of batch t: (per_rank,)."""
        return self._drawn(t)[0]

    def passes(self, t: int) -> int | Indices:
        return self._drawn(t)[1] if self.shares else self.epoch(t)

    def _drawn(self, t: int) -> tuple[Indices, int | Indices]:
        """Return the samples of batch t and their passes."""
        for number, samples, passes in tuple(self._recent):
            if number == t:
                return samples, passes
        epoch, within = divmod(t, self.num_batches)
        start = (within * self.world_size + self.rank) * self.per_rank
        positions = np.arange(start, start + self.per_rank)
        if self.shares:
            samples, passes = Weighted(self.seed, epoch, self.shares).samples(positions)
        else:
            samples, passes = self._samples(epoch, positions), epoch
        self._recent.append((t, samples, passes))
        return samples, passes

    def _samples(self, epoch: int, positions: Indices) -> Indices:
        """Return the samples at these positions of an epoch: (N,)."""
        if self.blocks is None:
            return rng.permuted(self.seed, "sample order", epoch, size=self.num_samples, positions=positions)
        if epoch not in self._windows:
            while len(self._windows) > 1:  # keep two: a backend that reads ahead reaches the next epoch first
                del self._windows[next(iter(self._windows))]
            self._windows[epoch] = _Windows(self.seed, epoch, self.blocks, self.window, self.num_samples)
        return self._windows[epoch].samples(positions)

    def batches_of(self, sample: int, epoch: int) -> list[tuple[int, int]]:
        """Return the numbers of the batches of an epoch that a sample is in, on whichever rank, each with its pass.

        An epoch leaves out the last samples that do not fill a batch.
        """
        samples, passes = np.array([sample]), np.array([epoch])
        if self.shares:
            positions, passes = Weighted(self.seed, epoch, self.shares).positions(sample)
        elif self.blocks is None:
            positions = rng.positions_in_permuted(
                self.seed, "sample order", epoch, size=self.num_samples, numbers=samples
            )
        else:
            positions = _Windows(self.seed, epoch, self.blocks, self.window, self.num_samples).positions(samples)
        within = (positions // self._micro_batch_size).tolist()
        placed = sorted(zip(within, passes.tolist(), strict=True))
        return [(epoch * self.num_batches + t, number) for t, number in placed if t < self.num_batches]

    def finished(self, t: int) -> bool:  # noqa: ARG002 (training never ends by itself)
        return False

    def state(self, t: int) -> dict[str, Any]:
        """Return the seed, the epoch, and ``position``, the epoch's samples before batch t on all ranks together."""
        epoch, within = divmod(t, self.num_batches)
        position = within * self._micro_batch_size
        state: dict[str, Any] = {"order": VERSION, "seed": self.seed, "epoch": epoch, "position": position}
        if self.shares:
            state["weights"] = [share.weight for share in self.shares]
        return state if self.blocks is None else {**state, "window": self.window}

    def seek(self, state: Mapping[str, Any]) -> int:
        if state["seed"] != self.seed or state["position"] % self._micro_batch_size:
            raise ConfigError("the checkpoint's sample order has another seed or batch size than this run's")
        window_before, window_now = state.get("window"), None if self.blocks is None else self.window
        if window_before != window_now:
            raise ConfigError(
                f"the checkpoint's samples were shuffled {_extent(window_before)}, and this run's are "
                f"{_extent(window_now)}: "
                "take the checkpoint's window"
            )
        weights_before, weights_now = state.get("weights"), [share.weight for share in self.shares or ()] or None
        if weights_before != weights_now:
            raise ConfigError(
                f"the checkpoint's folders had the weights {weights_before or 'of 1'}, and this run's have "
                f"{weights_now or 'weights of 1'}: take the checkpoint's --source.weights"
            )
        return state["epoch"] * self.num_batches + state["position"] // self._micro_batch_size

    @property
    def _micro_batch_size(self) -> int:
        """The number of samples per micro-batch on all ranks together."""
        return self.batch_size // self.accumulate


class _Windows:
    """An epoch's order of samples that lie in blocks.  Memory grows with the number of blocks, not of samples."""

    def __init__(self, seed: int, epoch: int, blocks: Indices, window: int, num_samples: int) -> None:
        self.seed, self.epoch = seed, epoch
        order = rng.permuted(seed, "block order", epoch, size=len(blocks), positions=np.arange(len(blocks)))
        self._first = blocks[order]
        lengths = np.diff(blocks, append=num_samples)[order]
        self._start = np.cumsum(lengths) - lengths  # of each block if only blocks were shuffled
        self._window_starts = np.append(self._start[::window], num_samples)

    def samples(self, positions: Indices) -> Indices:
        """Return the samples at these positions of the epoch: (N,)."""
        windows = np.searchsorted(self._window_starts, positions, side="right") - 1
        unshuffled = np.empty_like(positions)
        for window in np.unique(windows).tolist():
            in_window = windows == window
            start, stop = self._window_starts[window : window + 2].tolist()
            unshuffled[in_window] = start + rng.permuted(
                self.seed, "window order", self.epoch, window, size=stop - start, positions=positions[in_window] - start
            )
        block = np.searchsorted(self._start, unshuffled, side="right") - 1
        return self._first[block] + unshuffled - self._start[block]

    def positions(self, samples: Indices) -> Indices:
        """Return the positions of these samples in the epoch: (N,)."""
        filled = np.flatnonzero(np.diff(self._start, append=self._window_starts[-1]))  # a block may be empty
        ascending = filled[np.argsort(self._first[filled])]
        block = ascending[np.searchsorted(self._first[ascending], samples, side="right") - 1]
        unshuffled = self._start[block] + samples - self._first[block]
        windows = np.searchsorted(self._window_starts, unshuffled, side="right") - 1
        positions = np.empty_like(samples)
        for window in np.unique(windows).tolist():
            in_window = windows == window
            start, stop = self._window_starts[window : window + 2].tolist()
            positions[in_window] = start + rng.positions_in_permuted(
                self.seed, "window order", self.epoch, window, size=stop - start, numbers=unshuffled[in_window] - start
            )
        return positions


def _check_blocks(blocks: Indices, window: int, num_samples: int) -> None:
    """Raise ValueError unless these can be the first samples of blocks, which a source may have counted wrongly."""
    if len(blocks) == 0 or blocks[0] != 0 or (np.diff(blocks, append=num_samples) < 0).any():
        raise ValueError(
            f"blocks must be the indices of their first samples, ascending from 0 to at most {num_samples:,}, "
            f"the number of samples; got {blocks}"
        )
    if window < 1:
        raise ValueError(f"window must be at least 1 block, got {window}")


def _extent(window: int | None) -> str:
    return "as a whole" if window is None else f"in windows of {window} blocks"


class _OnePass:
    """What passes over a source have in common: they end after ``num_batches``, and their place is a batch's number."""

    @property
    def num_batches(self) -> int:
        raise NotImplementedError

    def epoch(self, t: int) -> int:  # noqa: ARG002
        return 0

    def passes(self, t: int) -> int:
        return self.epoch(t)

    def finished(self, t: int) -> bool:
        return t >= self.num_batches

    def state(self, t: int) -> dict[str, Any]:
        return {"batch": t}

    def seek(self, state: Mapping[str, Any]) -> int:
        return state["batch"]


@dataclass(frozen=True, kw_only=True)
class Sequential(_OnePass):
    """One pass for evaluation.  Sample i goes to rank i mod W.  The last batch may be smaller; nothing is padded."""

    num_samples: int
    per_rank: int
    rank: int = 0
    world_size: int = 1

    @property
    def num_batches(self) -> int:
        num_samples = len(range(self.rank, self.num_samples, self.world_size))
        return -(-num_samples // self.per_rank)

    def batch(self, t: int) -> Indices:
        samples = range(self.rank, self.num_samples, self.world_size)[t * self.per_rank : (t + 1) * self.per_rank]
        return np.arange(samples.start, samples.stop, samples.step)


@dataclass(frozen=True, kw_only=True)
class Pieces(_OnePass):
    """One pass over pieces of a source, in batches that depend on their piece alone.

    pieces: their numbers, ascending.  length: piece k has samples k * length up to (k + 1) * length or the last one.
    """

    num_samples: int
    per_rank: int
    length: int
    pieces: tuple[int, ...]

    def samples(self, piece: int) -> range:
        """Return the samples of a piece."""
        return range(piece * self.length, min((piece + 1) * self.length, self.num_samples))

    @property
    def num_batches(self) -> int:
        if not self.pieces:
            return 0
        num_in_last = -(-len(self.samples(self.pieces[-1])) // self.per_rank)
        return (len(self.pieces) - 1) * self._batches_per_piece + num_in_last

    def batch(self, t: int) -> Indices:
        number, within = divmod(t, self._batches_per_piece)
        samples = self.samples(self.pieces[number])[within * self.per_rank : (within + 1) * self.per_rank]
        return np.arange(samples.start, samples.stop)

    @property
    def _batches_per_piece(self) -> int:
        return -(-self.length // self.per_rank)


@dataclass(frozen=True, kw_only=True)
class Repeated(_OnePass):
    """The same samples once per epoch for ``num_epochs`` epochs, to see each one's augmentations."""

    index: Indices
    num_epochs: int

    @property
    def num_batches(self) -> int:
        return 1

    @property
    def per_rank(self) -> int:
        return len(self.index)

    def epoch(self, t: int) -> int:
        return t

    def batch(self, t: int) -> Indices:  # noqa: ARG002
        return self.index

    def finished(self, t: int) -> bool:
        return t >= self.num_epochs
