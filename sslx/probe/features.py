"""Frozen features of a whole split: extraction over ranks, the raw-pixel baseline, and random orders of rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslx import distributed, rng
from sslx.console.words import one_line
from sslx.data.batch import Batch
from sslx.encoders.modes import evaluation_mode as evaluation_mode
from sslx.errors import ConfigError, NonFiniteError, UserError
from sslx.machine import memory

Progress = Callable[[str, int, int], None]
"""Called as ``progress(task, num_done, num_total)`` during tasks that may take seconds."""

PIXEL_SIDE = 16
_GATHER_BYTES = 64 << 20


def no_progress(task: str, num_done: int, num_total: int) -> None:
    """Ignore progress, for callers that do not show it."""


@dataclass(frozen=True, eq=False)
class Features:
    """The features of one split, in the order of its source, on the CPU.

    x: (N, D) float32.  label: (N,) int64, or None if the source has no labels.
    index: (N,) int64, ascending indices of the rows' images in the source.
    """

    x: Tensor
    label: Tensor | None
    index: Tensor


def extract(
    encoder: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: torch.dtype | None = None,
    num_samples: int,
    num_views: int = 1,
    progress: Progress = no_progress,
) -> Features:
    """Compute the features of a split on all ranks and return all of them on each rank.

    encoder: (B, C, H, W) -> (B, D).  It runs in evaluation mode, and each submodule's mode is restored afterwards.
    batches: this rank's share of the split, in any order and with any batch size.  All ranks together must have each of
      the ``num_samples`` samples exactly once.
    autocast: dtype to autocast to, or None for float32 throughout.
    num_views: number of views whose features are concatenated, (N, num_views * D); by default only the first view.
    Raises NonFiniteError on all ranks if a feature is not finite.
    """

    # Inference mode covers only the encoder, because tensors that a loader caches must stay usable by autograd.
    def embed(view: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(view.device.type, autocast, enabled=autocast is not None),
        ):
            return encoder(view if autocast is not None else view.float())

    with evaluation_mode(encoder):
        return _collect(embed, batches, num_samples, num_views, progress)


def pixels(
    batches: Iterable[Batch],
    *,
    num_samples: int,
    num_views: int = 1,
    side: int = PIXEL_SIDE,
    progress: Progress = no_progress,
) -> Features:
    """Return the raw-pixel baseline: the normalized pixels of each sample, flattened to (N, C·H·W).

    Views larger than ``side`` × ``side`` pixels are first averaged down to that size.  At 224 pixels a row would hold
    150,528 numbers, and an ordinary training split would not fit in memory.  num_views: as in ``extract``.
    """

    def flatten(view: Tensor) -> Tensor:
        height, width = (min(length, side) for length in view.shape[-2:])
        return F.adaptive_avg_pool2d(view.float(), (height, width)).flatten(1)

    return _collect(flatten, batches, num_samples, num_views, progress)


def rows_by_class(label: Tensor, seed: int, name: str, *counters: int) -> dict[int, npt.NDArray[np.int64]]:
    """Return the rows of each class in ``label`` (N,), in a random order that depends on (seed, name, counters)."""
    values = label.numpy()
    rows = {int(c): np.flatnonzero(values == c) for c in np.unique(values)}
    return {c: r[rng.permutation(seed, name, *counters, c, size=len(r))] for c, r in rows.items()}


def _collect(
    embed: Callable[[Tensor], Tensor], batches: Iterable[Batch], num_samples: int, num_views: int, progress: Progress
) -> Features:
    world_size = distributed.world_size()
    x, label, index = list[Tensor](), list[Tensor](), list[Tensor]()
    num_done, problem = 0, None
    try:
        for batch in batches:
            x.append(torch.cat([embed(view).float().cpu() for view in batch.views[:num_views]], 1))
            memory.reuse_freed(batch.views[0].device)
            index.append(batch.index.cpu())
            if batch.label is not None:
                label.append(batch.label.cpu())
            num_done += len(batch)
            progress("features", min(num_done * world_size, num_samples), num_samples)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        problem = error if isinstance(error, UserError) else ConfigError(f"out of memory: {one_line(error)}")
    problems = [problem for problem in distributed.gather_objects(problem) if problem is not None]
    if problems:  # all ranks raise, because the others would wait for this one
        raise problems[0]
    parts = _gather(x, label, index, -(-num_samples // world_size))
    features = Features(
        torch.cat([part[0] for part in parts if len(part[0])]),
        torch.cat([part[1] for part in parts]) if any(len(part[1]) for part in parts) else None,
        torch.cat([part[2] for part in parts]),
    )
    return _sorted(features, num_samples)


def _gather(
    x: list[Tensor], label: list[Tensor], index: list[Tensor], max_rows: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gather all ranks' (x, label, index) in pieces of bounded size.

    max_rows: the largest number of rows on a rank.
    """
    empty = torch.empty(0, dtype=torch.int64)
    own = (
        torch.cat(x) if x else torch.empty(0, 0),
        torch.cat(label) if label else empty,
        torch.cat(index) if index else empty,
    )
    if distributed.world_size() == 1:
        return [own]
    dim = max(distributed.gather_objects(own[0].shape[1]))
    rows_per_piece = max(1, _GATHER_BYTES // (4 * dim))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max_rows, rows_per_piece):
        piece = tuple(tensor[start : start + rows_per_piece].numpy() for tensor in own)
        gathered = distributed.gather_objects(piece)
        parts += [(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(c)) for a, b, c in gathered]
    return parts


def _sorted(features: Features, num_samples: int) -> Features:
    order = features.index.argsort()
    label = None if features.label is None else features.label[order]
    features = Features(features.x[order], label, features.index[order])
    assert torch.equal(features.index, torch.arange(num_samples)), "a sample came twice, or never"
    assert label is None or len(label) == num_samples, "only some batches had labels"
    num_bad = int((~features.x.isfinite().all(1)).sum())
    if num_bad:
        raise NonFiniteError(
            f"expected finite features, but those of {num_bad} of {num_samples} samples are NaN or infinite: "
            "use an earlier checkpoint, or float32 instead of autocast"
        )
    return features
